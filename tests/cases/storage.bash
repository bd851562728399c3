# Network storage of hyper-converged clusters, as volumes of containers and as disks of virtual machines. Sourced by
# tests/suites/storage-*.sh, after cases/vms.bash.
#
# The servers run in the lab machine too: a Gluster volume with one brick, mounted at $gluster by FUSE, and an NBD
# server over TCP, whose device is $nbd.

address=10.99.0.1
gluster=/run/gluster-volume
# Not in /run, where `check` counts the files: a brick keeps some files after their removal.
brick=/srv/brick
nbd=/dev/nbd0

# Unpacks the packages of tests/lab/storage in the lab machine, and gives it an address for the servers. They refuse to
# serve a volume on 127.0.0.1.
install_storage() {
  local package
  # /sbin and others are links.
  for package in "$("$lab/storage")"/*.deb; do
    dpkg-deb --fsys-tarfile "$package" | tar -x -C / --keep-directory-symlink || return
  done
  ldconfig
  ip link add storage type dummy && ip address add "$address/24" dev storage && ip link set storage up
}

start_gluster() {
  modprobe fuse || return
  mkdir -p $brick $gluster /run/gluster
  truncate -s 512M $brick.ext4
  mkfs.ext4 -q $brick.ext4
  mount -o loop $brick.ext4 $brick || return
  glusterd --log-level WARNING || return
  local deadline=$((SECONDS + 120))
  until gluster --mode=script volume list >/dev/null 2>&1; do
    ((SECONDS < deadline)) || return 1
    read -r -t 0.5 -u "$never" || true
  done
  gluster --mode=script volume create disks "$address:$brick/data" force &&
    gluster --mode=script volume start disks &&
    mount -t glusterfs "$address:/disks" $gluster &&
    mountpoint -q $gluster
}

stop_gluster() {
  umount $gluster
  gluster --mode=script volume stop disks >/dev/null
  local pid
  for pid in $(pidof glusterd glusterfsd glusterfs); do kill "$pid"; done
  umount $brick
}

start_nbd() {
  modprobe nbd || return
  truncate -s 256M /run/nbd.raw
  qemu-nbd --fork --persistent --pid-file=/run/nbd.pid --bind="$address" --port=10809 --format=raw \
    --export-name=disk /run/nbd.raw && nbd-client -N disk "$address" 10809 $nbd
}

# The last case has ended the server.
stop_nbd() {
  nbd-client -d $nbd
  rm -f /run/nbd.pid
}

# volume_of_a_container FOLDER: checks that a container writes, reads and synchronizes files of this folder of the host,
# and that it has the same statistics of the file system.
volume_of_a_container() {
  new_name
  local volume=$1/container expected
  mkdir "$volume"
  echo of the host >"$volume/file"
  expected=$(stat -f -c '%S %b' "$volume")
  nutshell "$name" --rm --mount "type=bind,src=$volume,dst=/volume,options=rbind:rw" -- sh -ec '
    cat /volume/file
    stat -f -c "%S %b" /volume
    dd if=/dev/urandom of=/volume/data bs=1M count=4 conv=fsync 2>/dev/null
    sha256sum </volume/data
    mv /volume/data /volume/renamed
    rm /volume/file' >/run/tmp/output
  assert_equal "of the host,$expected,$(sha256sum <"$volume/renamed")" "$(paste -sd, /run/tmp/output)"
  assert_equal renamed "$(ls "$volume")"
  rm -r "$volume" /run/tmp/output
}

# The file system on the device is mounted on the host, as a CSI driver does.
file_system_on_nbd_is_a_volume_of_a_container() {
  mkdir /run/tmp/nbd
  mkfs.ext4 -q $nbd
  mount $nbd /run/tmp/nbd
  volume_of_a_container /run/tmp/nbd
  umount /run/tmp/nbd
  rmdir /run/tmp/nbd
}

# Prints the path of the disk in the image vm-raw, which an earlier case has unpacked.
disk_of_image() {
  find /run/containerd-root -path '*/fs/disk/disk.raw' -print -quit
}

# The second of two machines has what the first has written.
disk_on_gluster_boots_and_persists() {
  local volume=$gluster/machine root=/run/tmp/image boot sum
  mkdir -p "$volume" $root
  cp --sparse=always "$(disk_of_image)" "$volume/disk.img"
  for boot in 1 2; do
    new_name
    start_vm --rootfs --mount "type=bind,src=$volume,dst=/disks/system,options=rbind:rw" \
      --annotation io.containerd.nutshell.vm.disk.system=boot $root --
    wait_for_console "ready: .* boot $boot"
    ((boot == 2)) || sum=$(in_guest 'dd if=/dev/urandom of=/data bs=1M count=4 conv=fsync 2>/dev/null; sha256sum </data')
    assert_equal "$sum" "$(in_guest 'sha256sum </data')"
    ctr task kill --signal SIGTERM "$name"
    end_vm 0
  done
  rm -r "$volume" $root
}

# The lock of a disk holds on Gluster too.
disk_on_gluster_belongs_to_one_machine() {
  new_name
  local volume=$gluster/locked error image=vm-raw
  volume_disk "$volume" 8M
  local mount=type=bind,src=$volume,dst=/disks/data,options=rbind:rw
  start_image --mount "$mount"
  in_guest 'mount -t ext4 /dev/vdb /mnt && echo of the guest >/mnt/file && umount /mnt'
  error=$(ctr run --runtime "$runtime" --mount "$mount" "localhost/$image:latest" "$name-2" vm 2>&1) && return 1
  assert_contains "$error" "another virtual machine uses it"
  ctr container delete "$name-2" 2>/dev/null || true
  ctr task kill --signal SIGTERM "$name"
  end_vm 0
  assert_equal "of the guest" "$(debugfs -R 'cat /file' "$volume/disk.img" 2>/dev/null)"
  rm -r "$volume"
}

# Each of two machines writes a line to a file on the device.
nbd_device_is_a_disk_and_persists() {
  local image=vm-raw line
  mkfs.ext4 -q -F $nbd
  for line in first second; do
    new_name
    start_image --device $nbd
    assert_equal "${nbd##*/}" "$(in_guest 'cat /sys/block/vdb/serial; echo')"
    in_guest "mount -t ext4 /dev/vdb /mnt && echo $line >>/mnt/file && umount /mnt"
    ctr task kill --signal SIGTERM "$name"
    end_vm 0
  done
  assert_equal "first second" "$(debugfs -R 'cat /file' $nbd 2>/dev/null | paste -sd' ')"
}

# The second of two machines has what the first has written.
nbd_device_is_the_boot_disk_and_persists() {
  local root=/run/tmp/image boot
  mkdir $root
  dd if="$(disk_of_image)" of=$nbd bs=1M conv=fsync status=none
  for boot in 1 2; do
    new_name
    start_vm --rootfs --device $nbd --annotation "io.containerd.nutshell.vm.disk.${nbd##*/}=boot" $root --
    wait_for_console "ready: .* boot $boot"
    assert_equal "${nbd##*/}" "$(in_guest 'cat /sys/block/vda/serial; echo')"
    ctr task kill --signal SIGTERM "$name"
    end_vm 0
  done
  rm -r $root
}

# The server ends while the machine runs, and does not return.
lost_nbd_server_is_only_an_io_error_in_the_guest() {
  new_name
  local image=vm-raw
  start_image --device $nbd
  in_guest 'dd if=/dev/zero of=/dev/vdb bs=1M count=2 conv=fsync 2>/dev/null'
  kill "$(</run/nbd.pid)"
  ! in_guest 'dd if=/dev/zero of=/dev/vdb bs=1M count=2 conv=fsync 2>/dev/null' || return 1
  assert_equal alive "$(in_guest 'echo alive')"
  ctr task kill --signal SIGTERM "$name"
  end_vm 0
}

storage_cases() {
  check "Gluster volume is a volume of a container" volume_of_a_container $gluster
  check "disk on Gluster belongs to one machine" disk_on_gluster_belongs_to_one_machine
  check "disk on Gluster boots and persists" disk_on_gluster_boots_and_persists
  check "file system on NBD is a volume of a container" file_system_on_nbd_is_a_volume_of_a_container
  check "NBD device is a disk and persists" nbd_device_is_a_disk_and_persists
  check "NBD device is the boot disk and persists" nbd_device_is_the_boot_disk_and_persists
  check "lost NBD server is only an I/O error in the guest" lost_nbd_server_is_only_an_io_error_in_the_guest
}
