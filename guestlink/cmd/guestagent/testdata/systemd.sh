#!/bin/bash
# systemd.sh DIR AGENT UNIT TRANSPORT: this machine's own systemd as PID 1 of a
# work domain made of namespaces and an overlay of this machine's files, with
# AGENT as its guestagent and UNIT as the agent's unit, of which only the
# transport is another. Run by unshare with namespaces of every kind.
set -e
dir=$1 agent=$2 unit=$3 transport=$4
mount -t tmpfs tmpfs "$dir"
root=$dir/root
mkdir "$dir/upper" "$dir/work" "$root"
mount -t overlay overlay -o "lowerdir=/,upperdir=$dir/upper,workdir=$dir/work" "$root"
mount -t proc proc "$root/proc"
mount -t sysfs sysfs "$root/sys"
mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup"
mount -t tmpfs tmpfs "$root/run"
mount -t tmpfs -o mode=755 tmpfs "$root/dev"
for n in null zero full random urandom tty; do
  touch "$root/dev/$n"; mount --bind "/dev/$n" "$root/dev/$n"
done
mkdir "$root/dev/net" "$root/dev/pts"
mknod "$root/dev/net/tun" c 10 200
touch "$root/dev/console"
: > "$root/etc/machine-id"
cp "$agent" "$root/usr/sbin/guestagent"
cp "$unit" "$root/etc/systemd/system/guestagent.service"
mkdir -p "$root/etc/systemd/system/guestagent.service.d"
cat > "$root/etc/systemd/system/guestagent.service.d/test.conf" <<X
[Service]
ExecStart=
$(sed -n "s|^ExecStart=.*|& -transport $transport|p" "$unit")
X
cat > "$root/etc/systemd/system/test.target" <<X
[Unit]
Requires=guestagent.service
After=guestagent.service
X
exec env container=sekisho chroot "$root" /usr/lib/systemd/systemd --unit=test.target --log-target=null --show-status=0
