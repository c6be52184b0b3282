# Usage: machine.sh SCRATCH UID COMMAND...
#
# Runs COMMAND on a machine as its own: /mnt, /srv, the records of everybody's mounts, /sbin, /usr/local/bin, fstab and units are those of
# this mount namespace, and the processes end with this PID namespace. What COMMAND leaves mounted or attached is named in
# SCRATCH/left, and taken away. SCRATCH/bin is what is installed, SCRATCH/sudoers who may become root.
set -eu
scratch=$1
user=$2
shift 2

# The copies of other mounts would keep their daemons and devices busy.
mounts() { awk "\$1 ~ /^\/dev\/loop/ || \$3 == \"fuse.fusedisk\" { print \$2 }" /proc/self/mounts | tac; }
mounts | while read -r place; do umount -l "$place"; done

mkdir -p -m 700 /run/fusedisk
mount -t tmpfs -o mode=755 page /mnt
mount -t tmpfs -o mode=755 page /srv
mount -t tmpfs -o mode=700 page /run/fusedisk
mkdir -p /run/user
mount -t tmpfs -o mode=755 page /run/user
install -d -m 700 -o "$user" "/run/user/$user" "/tmp/fusedisk-$user"
for place in /tmp/fusedisk-[0-9]*; do mount -t tmpfs -o "mode=700,uid=${place##*-}" page "$place"; done
mkdir "$scratch/above"
mount -t tmpfs -o mode=755 page "$scratch/above"
for place in /usr/sbin /usr/local/bin /etc/systemd/system; do
    above=$scratch/above$place
    mkdir -p "$above/new" "$above/work"
    case $place in
    /usr/sbin) mknod "$above/new/mount.fuse.fusedisk" c 0 0 ;; # hides the one of the machine
    /usr/local/bin) cp "$scratch/bin/"* "$above/new" ;;
    esac
    mount -t overlay -o "lowerdir=$place,upperdir=$above/new,workdir=$above/work" page "$place"
done
for file in sudoers fstab fuse.conf; do
    [ -e "$scratch/$file" ] || : >"$scratch/$file"
    mount --bind "$scratch/$file" "/etc/$file"
done

timeout 300 "$@" || true

loops() {
    devices=$(awk '/ - fuse.fusedisk / { print $3 }' /proc/self/mountinfo)
    losetup -nlO NAME,BACK-MAJ:MIN | while read -r name device; do
        if printf '%s\n' "$devices" | grep -qx "$device"; then echo "$name"; fi
    done
}
{ mounts && loops; } >"$scratch/left"
mounts | while read -r place; do
    case $(findmnt -no FSTYPE "$place") in fuse.fusedisk) ;; *) umount -l "$place" ;; esac
done
for device in $(loops); do losetup -d "$device"; done
mounts | while read -r place; do umount -l "$place"; done
