# SPDX-License-Identifier: GPL-3.0-or-later
"""What can go wrong, one class per cause.

Law: an error is raised where its cause is known, says what happened, to which domain and disk,
and what to do, in one lower-case sentence; it becomes an errno in one place (`operations`) and
an exit status in another (`cli`). Nothing below those two knows either number's use.

Whatever belongs to a point in time that is over answers `EIO`, never `ESTALE`: on ESTALE the
kernel looks the whole path up again within the same system call, which would silently carry a
reader over into the next point.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import ClassVar


@dataclass(eq=False)
class BackupfsError(Exception):
    """Anything that backupfs itself refuses or has lost; `str()` is the sentence for the user."""

    errno: ClassVar[int] = errno.EIO
    exit_status: ClassVar[int] = 1
    told = False  # set on an error that stands in the log already; no field

    def __str__(self) -> str:
        raise NotImplementedError  # every cause has its own sentence

    def __post_init__(self) -> None:
        # A dataclass does not call Exception.__init__; without args the error cannot be pickled.
        self.args = tuple(getattr(self, name) for name in self.__dataclass_fields__)


# --- the command line and the mount point ------------------------------------------------------


@dataclass(eq=False)
class UsageError(BackupfsError):
    """The command line or an option is wrong."""

    errno: ClassVar[int] = errno.EINVAL
    exit_status: ClassVar[int] = 2
    reason: str

    def __str__(self) -> str:
        return self.reason


@dataclass(eq=False)
class MountPointError(BackupfsError):
    """The mount point cannot be used."""

    errno: ClassVar[int] = errno.EINVAL
    exit_status: ClassVar[int] = 32  # mount(8): mount failure
    path: str
    reason: str

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


@dataclass(eq=False)
class MissingDependency(BackupfsError):
    """A program or a module that backupfs needs is not installed."""

    errno: ClassVar[int] = errno.ENOENT
    exit_status: ClassVar[int] = 3
    what: str
    package: str

    def __str__(self) -> str:
        return f"{self.what} is missing: install the package {self.package}"


# --- libvirt -----------------------------------------------------------------------------------


@dataclass(eq=False)
class LibvirtUnavailable(BackupfsError):
    """No libvirt answers at the URI."""

    errno: ClassVar[int] = errno.EIO
    exit_status: ClassVar[int] = 4
    uri: str
    reason: str

    def __str__(self) -> str:
        return f"cannot reach libvirt at {self.uri or 'its default URI'}: {self.reason}"


@dataclass(eq=False)
class LibvirtRefused(BackupfsError):
    """Libvirt refused a call for a reason of its own."""

    domain: str
    action: str
    reason: str

    def __str__(self) -> str:
        return f"{self.domain}: cannot {self.action}: {self.reason}"


@dataclass(eq=False)
class LibvirtTimeout(LibvirtRefused):
    """Libvirt, or QEMU behind it, did not answer in time."""

    errno: ClassVar[int] = errno.EIO


@dataclass(eq=False)
class AccessRefused(LibvirtRefused):
    """Libvirt does not allow this user to do it."""

    errno: ClassVar[int] = errno.EACCES


@dataclass(eq=False)
class AgentUnavailable(LibvirtRefused):
    """The guest agent cannot be asked, or has not answered; *configured*: the domain has its channel."""

    configured: bool = True


@dataclass(eq=False)
class AgentRefused(LibvirtRefused):
    """The guest agent answered, with a refusal; *frozen*: because somebody has frozen the guest."""

    frozen: bool = False


@dataclass(eq=False)
class NoSuchDomain(BackupfsError):
    """The domain is not known at the URI."""

    errno: ClassVar[int] = errno.ENOENT
    exit_status: ClassVar[int] = 5
    source: str
    uri: str

    def __str__(self) -> str:
        return f"no domain with the name or UUID {self.source!r} at {self.uri}: see `virsh -c {self.uri} list --all`"


@dataclass(eq=False)
class DomainNotRunning(BackupfsError):
    """A pull backup needs a running QEMU."""

    errno: ClassVar[int] = errno.EIO
    domain: str
    state: str

    def __str__(self) -> str:
        return f"{self.domain}: the domain is {self.state}; start it, then look again"


@dataclass(eq=False)
class DomainInUse(BackupfsError):
    """Another backupfs serves this domain already."""

    errno: ClassVar[int] = errno.EBUSY
    exit_status: ClassVar[int] = 6
    domain: str
    holder: str

    def __str__(self) -> str:
        return f"{self.domain}: already mounted by {self.holder}; unmount that first, or use it"


@dataclass(eq=False)
class WatchdogBusy(BackupfsError):
    """The watchdog of a killed mount still has its job to end."""

    errno: ClassVar[int] = errno.EBUSY
    exit_status: ClassVar[int] = 6
    domain: str
    holder: str

    def __str__(self) -> str:
        return (
            f"{self.domain}: the watchdog of the mount before ({self.holder}) is still ending its backup job;"
            " is QEMU stopped, or libvirtd away? let it run, then mount again"
        )


@dataclass(eq=False)
class WatchdogGone(BackupfsError):
    """No watchdog runs, and without one no backup job begins."""

    errno: ClassVar[int] = errno.EIO
    domain: str
    reason: str

    def __str__(self) -> str:
        return f"{self.domain}: no backup begins without a watchdog: {self.reason}; if it stays so, mount again"


@dataclass(eq=False)
class ForeignJob(BackupfsError):
    """Another program's job runs on the domain; it is never touched."""

    errno: ClassVar[int] = errno.EBUSY
    domain: str
    job: str

    def __str__(self) -> str:
        return f"{self.domain}: {self.job} is running, and it is not ours; wait for it, or end it where it was started"


@dataclass(eq=False)
class JobStuck(BackupfsError):
    """Libvirt keeps a job that it has forgotten: it was killed while the job began (libvirt 9.0)."""

    domain: str

    def __str__(self) -> str:
        return (
            f"{self.domain}: libvirt was killed while a backup began, and keeps a job that nobody can end; "
            "shut the guest down, restart libvirt, then start the guest"
        )


@dataclass(eq=False)
class DiskUnusable(BackupfsError):
    """A disk that belongs into the backup cannot be served as things are."""

    errno: ClassVar[int] = errno.EIO
    exit_status: ClassVar[int] = 7
    domain: str
    disk: str
    reason: str
    cure: str

    def __str__(self) -> str:
        return f"{self.domain}: disk {self.disk}: {self.reason}; {self.cure}"


@dataclass(eq=False)
class ScratchFull(BackupfsError):
    """There is less room for old blocks than must stay free."""

    errno: ClassVar[int] = errno.ENOSPC
    domain: str
    folder: str
    kind: str
    free: str
    reserve: str

    def __str__(self) -> str:
        return (
            f"{self.domain}: {self.folder} ({self.kind}), where QEMU would save old blocks, has {self.free} free,"
            f" which is not more than the reserve of {self.reserve}; make room, name another with -o scratch=DIR,"
            " or a smaller -o scratch-reserve="
        )


@dataclass(eq=False)
class ScratchUnusable(BackupfsError):
    """QEMU cannot save old blocks in the folder."""

    errno: ClassVar[int] = errno.EIO
    domain: str
    folder: str
    reason: str
    cure: str

    def __str__(self) -> str:
        return f"{self.domain}: QEMU cannot save old blocks in {self.folder}: {self.reason}; {self.cure}"


# --- checkpoints -------------------------------------------------------------------------------


@dataclass(eq=False)
class CheckpointUnusable(LibvirtRefused):
    """A checkpoint is gone, or its bitmap is gone or broken."""


@dataclass(eq=False)
class CheckpointExists(BackupfsError):
    """There is a checkpoint of that name."""

    errno: ClassVar[int] = errno.EEXIST
    domain: str
    checkpoint: str

    def __str__(self) -> str:
        return f"{self.domain}: there is a checkpoint {self.checkpoint} already"


@dataclass(eq=False)
class BadCheckpointName(BackupfsError):
    """Libvirt has no checkpoint of that name."""

    errno: ClassVar[int] = errno.EINVAL
    domain: str
    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.domain}: no checkpoint can be called {self.name!a}: {self.reason}"


@dataclass(eq=False)
class NoBitmap(BackupfsError):
    """No disk of the domain can hold a checkpoint's bitmap."""

    errno: ClassVar[int] = errno.EOPNOTSUPP
    domain: str
    reasons: str

    def __str__(self) -> str:
        return f"{self.domain}: no checkpoint can be made, for no disk can hold its bitmap: {self.reasons}"


@dataclass(eq=False)
class PointInUse(BackupfsError):
    """Another process uses the point in time that would have to end."""

    errno: ClassVar[int] = errno.EBUSY
    domain: str
    instant: int
    holders: str

    def __str__(self) -> str:
        return (
            f"{self.domain}: the point in time {self.instant} is in use by {self.holders};"
            " wait for it, or run `backupfs release MOUNTPOINT`"
        )


@dataclass(eq=False)
class BaseForgotten(BackupfsError):
    """What changed since a pruned checkpoint is not known any more."""

    domain: str
    checkpoint: str

    def __str__(self) -> str:
        return (
            f"{self.domain}: checkpoint {self.checkpoint} was pruned, and the history that could tell what has changed"
            f" since is lost or in doubt; rmdir it, and make a full copy"
        )


# --- the point in time -------------------------------------------------------------------------


@dataclass(eq=False)
class PointOver(BackupfsError):
    """What was asked for belongs to a point in time that has ended."""

    domain: str
    instant: int

    def __str__(self) -> str:
        return f"{self.domain}: the point in time {self.instant} is over; look the path up again for the next one"


@dataclass(eq=False)
class PointLost(BackupfsError):
    """The backup job ended under the point in time's readers."""

    domain: str
    reason: str

    def __str__(self) -> str:
        return f"{self.domain}: the point in time is lost: {self.reason}"


@dataclass(eq=False)
class NotQuiesced(BackupfsError):
    """The point was to begin with the guest's file systems frozen, and they cannot be."""

    domain: str
    reason: str

    def __str__(self) -> str:
        return f"{self.domain}: no freeze, which quiesce= requires: {self.reason}; quiesce=auto goes on without"


@dataclass(eq=False)
class NotThawed(BackupfsError):
    """The guest's file systems were frozen by us, and its agent does not thaw them."""

    domain: str
    reason: str

    def __str__(self) -> str:
        return (
            f"{self.domain}: its file systems may still be frozen: {self.reason};"
            f" restart the guest's agent, twice if need be, until `virsh domfsthaw {self.domain}` works,"
            " or run `fsfreeze -u` in the guest"
        )


@dataclass(eq=False)
class NotBegun(BackupfsError):
    """With `begin=command` or `begin=mkdir` a look begins no point in time."""

    domain: str
    cure: str

    def __str__(self) -> str:
        return f"{self.domain}: no point in time has begun; {self.cure}"


# --- NBD ---------------------------------------------------------------------------------------


@dataclass(eq=False)
class NbdUnavailable(BackupfsError):
    """The NBD server cannot be reached, or the connection broke and could not be made again."""

    export: str
    reason: str

    def __str__(self) -> str:
        return f"{self.export}: no NBD connection: {self.reason}"


@dataclass(eq=False)
class NbdTimeout(NbdUnavailable):
    """The NBD server stopped answering."""

    seconds: float

    def __str__(self) -> str:
        return f"{self.export}: the NBD server has not answered for {self.seconds:g} s ({self.reason})"


@dataclass(eq=False)
class NbdReadFailed(BackupfsError):
    """The NBD server answered a read with an error."""

    export: str
    offset: int
    length: int
    reason: str

    def __str__(self) -> str:
        return f"{self.export}: reading {self.length} bytes at {self.offset} failed: {self.reason}"


@dataclass(eq=False)
class NbdProtocolError(BackupfsError):
    """The NBD server told something that cannot be."""

    export: str
    reason: str

    def __str__(self) -> str:
        return f"{self.export}: the NBD server cannot be believed: {self.reason}"


# --- the state folder --------------------------------------------------------------------------


@dataclass(eq=False)
class StateFolderError(BackupfsError):
    """The state folder cannot be read or written."""

    exit_status: ClassVar[int] = 8
    path: str
    reason: str

    def __str__(self) -> str:
        return f"state folder {self.path}: {self.reason}"


# --- the tree ----------------------------------------------------------------------------------


@dataclass(eq=False)
class NoSuchFile(BackupfsError):
    """The tree has nothing of that name."""

    errno: ClassVar[int] = errno.ENOENT
    path: str

    def __str__(self) -> str:
        return f"no such file: {self.path}"


@dataclass(eq=False)
class ReadOnly(BackupfsError):
    """The mount cannot be written to."""

    errno: ClassVar[int] = errno.EROFS
    path: str

    def __str__(self) -> str:
        return f"{self.path}: a backup is read-only"


@dataclass(eq=False)
class BadXml(BackupfsError):
    """Libvirt told XML that cannot be understood."""

    what: str
    reason: str

    def __str__(self) -> str:
        return f"{self.what} cannot be read: {self.reason}"
