# SPDX-License-Identifier: GPL-3.0-or-later
"""A libvirt of one's own and small real guests, for the tests and the demo.

    with open_libvirt(folder) as libvirt:                  # libvirtd as `nobody`, own folders
        with open_guest(libvirt, [Disk("vda", ext4=True)]) as guest:
            guest.run("mount /dev/vda /mnt && echo hello > /mnt/file")

Nothing here is installed, and nothing of the machine's own libvirt is touched: the daemon's
sockets, state, logs and images all lie in one folder, and everything that was started ends with
its context, or with the process that started it.
"""

from lab.guest import Disk, Guest, open_guest
from lab.libvirtd import Libvirt, open_libvirt

__all__ = ["Disk", "Guest", "Libvirt", "open_guest", "open_libvirt"]
