"""A real SLURM cluster and real ssh hosts inside one machine, for the tests that need them.

Each host is a set of kernel namespaces (network, host name, process table, mounts, IPC). A bridge in the network of
``head`` connects the hosts. They share the file system, as on a cluster; /run, /dev/shm and the configuration in /etc
are separate. Nothing outside the namespaces changes, and all hosts end with the process that created them.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "pdsh", "sshd", "ip", "unshare", "nsenter", "setpriv")
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
NODES = ("node1", "node2")
NETWORK = "10.83.7"

# first process of a host; arguments: NAME ROOT
_INIT = """
set -e
hostname "$1"; ip link set lo up; mount -t proc proc /proc
mount -t tmpfs -o mode=755 tmpfs /run; mkdir -p /run/munge /run/slurm /run/sshd
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
mkdir -p /run/etc; cp -r "$2"/etc/. /run/etc/; echo "$1" >/run/etc/hostname
for name in hosts hostname resolv.conf; do [ ! -e /etc/$name ] || mount --bind /run/etc/$name /etc/$name; done
mkdir -p /etc/slurm; mount --bind /run/etc/slurm /etc/slurm
mount --bind /run/etc/ssh_config /etc/ssh/ssh_config
[ ! -e /root/.bashrc ] || mount --bind /dev/null /root/.bashrc
touch "$2/$1.up"
trap '' HUP INT; while :; do sleep 3600 & wait $! || :; done
"""

_SLURM_CONF = """
ClusterName=tests
SlurmctldHost=head({network}.1)
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
# seconds by which SLURM delays a requeued job; 5 is the minimum
AuthInfo=cred_expire=5
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool-%n
SlurmctldPidFile=/run/slurm/slurmctld.pid
SlurmdPidFile=/run/slurm/slurmd.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd-%n.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
ReturnToService=2
KillWait=5
SlurmdTimeout=10
SlurmctldTimeout=10
MessageTimeout=5
TCPTimeout=2
AccountingStorageType=accounting_storage/none
NodeName=node1 NodeAddr={network}.11 CPUs=8 CoresPerSocket=8 RealMemory=8000 State=UNKNOWN
NodeName=node2 NodeAddr={network}.12 CPUs=8 CoresPerSocket=8 RealMemory=8000 State=UNKNOWN
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE DefaultTime=10 State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL MaxTime=INFINITE DefaultTime=10 State=UP PriorityTier=2 PreemptMode=OFF
"""

# SLURM's own containers, one per task, named by node, user, job, step and task. Without exec, the shell that SLURM
# starts first would die of the signal that asks the ranks to save
_OCI_CONF = """
RunTimeQuery="{root}/runtime state %n.%u.%j.%s.%t"
RunTimeRun="exec {root}/runtime run --bundle %b %n.%u.%j.%s.%t"
RunTimeKill="{root}/runtime kill --all %n.%u.%j.%s.%t KILL"
RunTimeDelete="{root}/runtime delete --force %n.%u.%j.%s.%t"
"""

# SLURM 22.05 does not set a task's variables in its container; here each node has one task. crun does not start where
# cgroups v1 and v2 are both mounted, even with --cgroup-manager=disabled
_RUNTIME = """#!/bin/sh
[ "$1" != run ] || python3 -c '
import json, os, subprocess, sys
bundle = json.load(open(sys.argv[1]))
variables = bundle["process"]["env"]
nodes = dict(variable.split("=", 1) for variable in variables)["SLURM_JOB_NODELIST"]
names = subprocess.check_output(["scontrol", "show", "hostnames", nodes], text=True).split()
variables += [f"SLURM_PROCID={names.index(os.uname().nodename)}", "SLURM_LOCALID=0"]
json.dump(bundle, open(sys.argv[1], "w"))
' "$3"/config.json || exit
exec unshare --mount sh -c '
    mount -t tmpfs tmpfs /sys/fs/cgroup
    exec crun --cgroup-manager=disabled --root=/run/crun "$@"
' crun "$@"
"""

_SSHD_CONFIG = """
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
AuthorizedKeysFile {root}/authorized_keys
StrictModes no
UsePAM no
UseDNS no
SetEnv PATH={path}
MaxStartups 100
PidFile /run/sshd.pid
"""

_SSH_CONFIG = """
Host *
  IdentityFile {root}/key
  IdentitiesOnly yes
  UserKnownHostsFile /dev/null
  StrictHostKeyChecking no
  LogLevel ERROR
  BatchMode yes
  ConnectTimeout 5
"""


def why_not() -> str | None:
    """Return the reason why no cluster can start here, or None."""
    if not os.environ.get("FUSIONTREE_CLUSTER"):
        return "the tests on a real SLURM cluster and real ssh hosts run by `make test-cluster`"
    lacking = [program for program in PROGRAMS if shutil.which(program, path=PATH) is None]
    if lacking:
        return f"no {', '.join(lacking)} here (Debian: slurm-wlm munge pdsh openssh-server iproute2)"
    tried = subprocess.run(["unshare", "--net", "--mount", "--pid", "--fork", "true"], capture_output=True, check=False)
    return "this user may not create namespaces (needs root)" if tried.returncode else None


class Cluster:
    """Context manager for a cluster: ``head``, with users and the controller, and two compute nodes."""

    def __init__(self, root: Path):
        self.root = root
        self.inits: dict[str, subprocess.Popen[bytes]] = {}  # by host: the process that keeps its namespaces

    def __enter__(self) -> "Cluster":
        try:
            self._configure()
            self._boot("head")
            self._net(
                "head",
                "sh",
                "-c",
                f"ip link add br0 type bridge && ip addr add {NETWORK}.1/24 dev br0 && ip link set br0 up",
            )
            self._daemon("head", "munged")
            self._daemon("head", "slurmctld")
            for node in NODES:
                self.boot(node)
            self.settle()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for name in list(self.inits):
            self._kill(name)

    # --- operations of the tests

    def run(self, *words: object, on: str = "head", code: int | None = 0, timeout: float = 120, **environment: str):
        """Run a command on a host and check its exit code (None: any)."""
        done = subprocess.run(
            self.command(on, *words),
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            env=_clean(environment),
        )
        assert code in (None, done.returncode), f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def start(self, *words: object, on: str = "head", **environment: str) -> subprocess.Popen[str]:
        """Start a command on a host."""
        return subprocess.Popen(
            self.command(on, *words),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=_clean(environment),
        )

    def command(self, host: str, *words: object) -> list[str]:
        """Return the command that runs `words` on `host` in the current folder."""
        return [
            "nsenter",
            "-t",
            str(self.pid(host)),
            "-m",
            "-u",
            "-i",
            "-n",
            "-p",
            "-W",
            os.getcwd(),
            "--",
            *map(str, words),
        ]

    def pid(self, host: str) -> int:
        """Return the process id of the host's first process, outside its namespaces."""
        unshare = self.inits[host].pid
        return int(Path(f"/proc/{unshare}/task/{unshare}/children").read_text().split()[0])

    def cut(self, node: str) -> None:
        """Disconnect the node from the network; its processes keep running."""
        self._net("head", "ip", "link", "set", node, "down")

    def crash(self, node: str) -> None:
        """Disconnect the node and kill all its processes, like a power failure."""
        self.cut(node)
        self._kill(node)

    def boot(self, node: str) -> None:
        """Start a node that is down, or reconnect one that runs."""
        if node in self.inits:
            self._net("head", "ip", "link", "set", node, "up")
            return
        self._boot(node)
        address = f"{NETWORK}.{11 + NODES.index(node)}/24"
        self._net("head", "sh", "-c", f"ip link del {node} 2>/dev/null || true")
        self._net(
            "head", "ip", "link", "add", node, "type", "veth", "peer", "name", "eth0", "netns", str(self.pid(node))
        )
        self._net("head", "ip", "link", "set", node, "master", "br0", "up")
        self._net(node, "sh", "-c", f"ip addr add {address} dev eth0 && ip link set eth0 up")
        self._daemon(node, "munged")
        self._daemon(node, "slurmd", "-N", node)
        self._daemon(
            node, "/usr/sbin/sshd", "-f", str(self.root / "etc/sshd_config"), "-h", str(self.root / "host_key")
        )

    def settle(self) -> None:
        """Bring both nodes up and wait until they are idle."""
        for node in NODES:
            self.boot(node)

        def idle() -> bool:
            states = dict(line.split() for line in self.run("sinfo", "-hN", "-o", "%N %t").stdout.splitlines())
            for node in NODES:
                if states.get(node, "").startswith(("down", "drain")):
                    self.run("scontrol", "update", f"nodename={node}", "state=resume", code=None)
            return all(states.get(node) == "idle" for node in NODES)

        until(idle, 60)

    def state(self, job: str) -> dict[str, str]:
        """Return SLURM's record of a job."""
        line = self.run("scontrol", "show", "job", "-o", job).stdout
        return dict(word.split("=", 1) for word in line.split() if "=" in word)

    # --- setup

    def _configure(self) -> None:
        etc = self.root / "etc"
        (etc / "slurm").mkdir(parents=True)
        (self.root / "state").mkdir()
        names = {f"{NETWORK}.1": "head", f"{NETWORK}.11": "node1", f"{NETWORK}.12": "node2"}
        (etc / "hosts").write_text("127.0.0.1 localhost\n" + "".join(f"{a} {n}\n" for a, n in names.items()))
        (etc / "resolv.conf").write_text("")
        facts = {"root": self.root, "network": NETWORK, "path": PATH}
        (etc / "slurm/slurm.conf").write_text(_SLURM_CONF.format(**facts))
        (etc / "slurm/oci.conf").write_text(_OCI_CONF.format(**facts))
        (self.root / "runtime").write_text(_RUNTIME)
        (self.root / "runtime").chmod(0o755)
        (etc / "sshd_config").write_text(_SSHD_CONFIG.format(**facts))
        (etc / "ssh_config").write_text(_SSH_CONFIG.format(**facts))
        for name in ("key", "host_key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.root / name], check=True)
        shutil.copy(self.root / "key.pub", self.root / "authorized_keys")
        key = self.root / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(1024))

    def _boot(self, host: str) -> None:
        up = self.root / f"{host}.up"
        up.unlink(missing_ok=True)
        spaces = ["--net", "--uts", "--ipc", "--mount", "--propagation", "slave", "--pid", "--fork", "--kill-child"]
        command = [
            "setpriv",
            "--pdeathsig",
            "KILL",
            "unshare",
            *spaces,
            "bash",
            "-c",
            _INIT,
            "init",
            host,
            str(self.root),
        ]
        with open(self.root / f"{host}.log", "ab") as log:
            self.inits[host] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=_clean({}), start_new_session=True
            )
        until(up.exists, 10)

    def _daemon(self, host: str, program: str, *options: str) -> None:
        if program == "munged":
            options = (
                "--force",
                f"--key-file={self.root}/munge.key",
                "--socket=/run/munge/munge.socket.2",
                "--pid-file=/run/munge/munged.pid",
                f"--log-file={self.root}/munged-{host}.log",
                "--seed-file=/run/munge/seed",
            )
        elif program == "slurmd":
            (self.root / f"spool-{host}").mkdir(exist_ok=True)
        self._enter(host, program, *options)

    def _enter(self, host: str, *words: str) -> None:
        self._logged(host, self.command(host, *words))

    def _net(self, host: str, *words: str) -> None:
        """Run a command in the network namespace of a host, with the process ids outside it."""
        self._logged(host, ["nsenter", "-t", str(self.pid(host)), "-n", "--", *words])

    def _logged(self, host: str, command: list[str]) -> None:
        with open(self.root / f"{host}.log", "ab") as log:
            subprocess.run(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=True, env=_clean({}))

    def _kill(self, host: str) -> None:
        unshare = self.inits.pop(host)
        unshare.kill()  # --kill-child also kills the host's first process, and the kernel then kills all others
        unshare.wait()


def _clean(more: Mapping[str, str]) -> dict[str, str]:
    return {"PATH": PATH, "HOME": "/root", "LANG": "C.UTF-8", **more}


def until(condition: Callable[[], object], seconds: float, event: str = "") -> None:
    """Wait until `condition` is true; fail after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s in vain for {event or condition}"
        time.sleep(0.1)


def steps(run: Path) -> list[int]:
    """Return the steps in the run's metrics."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line)["step"] for line in lines if line.endswith("\n")]


def training(run: Path, step: int) -> None:
    """Wait until the run has recorded step `step`."""
    until(lambda: max(steps(run), default=0) >= step, 120, f"step {step} of {run}")


def ranks(cluster: Cluster, run: Path) -> list[tuple[str, str]]:
    """Return node and id of every process that trains `run`, parents first; a crashed node has none."""
    pattern, nodes = f"[-]m fusiontree train {run}/config.yaml", [node for node in NODES if node in cluster.inits]
    found = {node: cluster.run("pgrep", "-f", pattern, on=node, code=None).stdout.split() for node in nodes}
    return [(node, pid) for node, pids in found.items() for pid in pids]


def image(folder: Path) -> Path:
    """Create an OCI bundle: this machine's files under another root, with Python at /image/bin."""
    root = folder / "rootfs"
    shared = [path for path in Path("/").iterdir() if path.is_dir() and path.name not in ("proc", "run")]
    for path in [*shared, Path("/proc"), Path("/run"), Path("/image/bin")]:
        (root / path.relative_to("/")).mkdir(parents=True)
    python = root / "image/bin/python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    mounts = [{"destination": str(path), "source": str(path), "type": "none", "options": ["rbind"]} for path in shared]
    config = {
        "ociVersion": "1.0.0",
        "root": {"path": "rootfs"},
        "process": {"cwd": "/", "args": ["true"], "user": {"uid": 0, "gid": 0}},
        "mounts": [{"destination": "/proc", "source": "proc", "type": "proc"}, *mounts],
        "linux": {"namespaces": [{"type": "mount"}]},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@contextlib.contextmanager
def full_disk(cluster: Cluster, host: str, folder: Path) -> Iterator[None]:
    """Mount a full disk on `folder`, on `host` only, while the block runs."""
    cluster.run("mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder, on=host)
    yield
    cluster.run("umount", folder, on=host)
