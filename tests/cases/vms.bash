# Virtual machines that boot the disk in their image. Sourced by tests/suites/*.sh, after cases/containers.bash.
#
# The disks are those of tests/images/disk: their init prints a line that begins with "ready:", and executes the lines
# of the console.

# The client of a VM writes the output of the VM's console to $console.out. Cases write the input to the descriptor
# $console_input.
console=/run/tmp/console
# How many seconds wait_for_console waits.
console_limit=120

# start_vm [OPTION...] -- [WORD...]: starts the VM $name from the image $image as a client in the background, whose pid
# is $client. The words are the command, `vm` if there are none.
start_vm() {
  local options=()
  while [[ $1 != -- ]]; do
    options+=("$1")
    shift
  done
  shift
  (($#)) || set -- vm
  # A case that failed may have left them.
  rm -f $console.*
  mkfifo $console.in
  exec {console_input}<>$console.in
  ctr run --snapshotter "$snapshotter" --runtime "$runtime" "${options[@]}" "$name" "$@" \
    <$console.in >$console.out 2>$console.errors &
  client=$!
}

# start_image [OPTION...]: starts a VM from the image $image, and waits until its guest is ready.
start_image() {
  start_vm "$@" "localhost/$image:latest" --
  wait_for_console "ready: "
}

# wait_for_console PATTERN [COUNT]: waits for COUNT lines that match, 1 if not given.
wait_for_console() {
  local deadline=$((SECONDS + console_limit))
  until (($(grep -c -- "$1" $console.out || true) >= ${2:-1})); do
    if ((SECONDS >= deadline)) || [[ ! -e /proc/$client ]]; then
      echo "not on the console: $1" >&2
      cat $console.out $console.errors >&2
      return 1
    fi
    read -r -t 0.1 -u "$never" || true
  done
}

# in_guest COMMAND: executes it in the guest, and prints its output. Fails if the command fails.
in_guest() {
  local before
  before=$(stat -c %s $console.out)
  echo "$1; echo \"end: \$?\"" >&"$console_input"
  local deadline=$((SECONDS + 60))
  until tail -c "+$((before + 1))" $console.out | grep -q '^end: [0-9]'; do
    ((SECONDS < deadline)) || {
      echo "the guest does not answer: $1" >&2
      return 1
    }
    read -r -t 0.1 -u "$never" || true
  done
  tail -c "+$((before + 1))" $console.out | tr -d '\r' | sed '/^end: /,$d'
  tail -c "+$((before + 1))" $console.out | grep -q '^end: 0'
}

# end_vm STATUS: waits until the client ends with this status, and removes the container and the files of the console.
end_vm() {
  local status=0
  wait "$client" || status=$?
  exec {console_input}>&-
  rm $console.in
  assert_equal "$1" "$status"
  ctr container delete "$name"
  rm $console.out $console.errors
}

# checksum_of_base: the checksum of the disk in the unpacked image.
checksum_of_base() {
  find /run/containerd-root -path '*/fs/disk/disk.*' -exec sha256sum {} + | sort
}

boots_its_own_kernel_and_switches_off_on_sigterm() {
  new_name
  local image=$1 release=$2 before
  start_image
  before=$(checksum_of_base)
  assert_contains "$(<$console.out)" "ready: $release"
  assert_contains "$(in_guest 'uname -r')" "$release"
  in_guest 'dd if=/dev/urandom of=/data bs=1M count=4 2>/dev/null && sync'
  ctr task kill --signal SIGTERM "$name"
  end_vm 0
  assert_equal "$before" "$(checksum_of_base)"
}

raw_disk_boots() {
  boots_its_own_kernel_and_switches_off_on_sigterm vm-raw 6.12.
}

qcow2_disk_with_zlib_boots() {
  boots_its_own_kernel_and_switches_off_on_sigterm vm-qcow2 6.12.
}

qcow2_disk_with_zstd_boots() {
  boots_its_own_kernel_and_switches_off_on_sigterm vm-zstd 6.1.
}

# The second machine of an image needs no disk reader. Its guest keeps the data that it has written, and a changed boot
# loader configuration takes effect at a reboot, which reads the disk.
reboot_in_the_guest_boots_the_same_disk_again() {
  new_name
  local image=vm-raw vmm again
  rm -rf /var/cache/nutshell
  start_image
  echo 'poweroff -f' >&"$console_input"
  end_vm 0
  grep -q "task $name: the disk's kernel was found in" /run/containerd.log
  assert_equal 1 "$(find /var/cache/nutshell/kernels -name kernel | wc -l)"
  new_name
  start_image --memory-limit 268435456 --cpus 2
  grep -q "task $name: the disk's kernel, found in .*, is in the cache" /run/containerd.log
  vmm=$(pids_of vmm)
  assert_equal 2 "$(in_guest nproc)"
  in_guest 'sed -i "s/ quiet / quiet nutshell.marker=1 /" /boot/grub/grub.cfg && sync'
  echo 'reboot -f' >&"$console_input"
  wait_for_console 'ready: .* boot 2'
  assert_contains "$(in_guest 'cat /proc/cmdline')" "nutshell.marker=1"
  grep -q "task $name: the disk's kernel was found in" /run/containerd.log
  again=$(pids_of vmm)
  [[ -n $again && $again != "$vmm" ]]
  assert_equal RUNNING "$(ctr task ls | awk -v name="$name" '$1 == name { print $3 }')"
  echo 'poweroff -f' >&"$console_input"
  end_vm 0
}

reboot_ends_the_task_if_on_reboot_is_exit() {
  new_name
  local image=vm-raw
  start_image --annotation io.containerd.nutshell.vm.on-reboot=exit
  echo 'reboot -f' >&"$console_input"
  end_vm 0
}

# Nothing in the guest listens to the power button yet.
sigterm_during_the_first_boot_has_no_effect() {
  new_name
  local image=vm-raw deadline=$((SECONDS + 60))
  start_vm "localhost/$image:latest" --
  until [[ $(ctr task ls | awk -v name="$name" '$1 == name { print $3 }') == RUNNING ]]; do
    ((SECONDS < deadline)) || return 1
    read -r -t 0.1 -u "$never" || true
  done
  # Before its vCPU runs, SIGTERM ends the task.
  until cat /proc/"$(pids_of vmm)"/task/*/comm 2>/dev/null | grep -q '^vcpu'; do
    ((SECONDS < deadline)) || return 1
    read -r -t 0.1 -u "$never" || true
  done
  ctr task kill --signal SIGTERM "$name"
  ! grep -q "ready: " $console.out || return 1
  wait_for_console "ready: "
  in_guest 'uname -r'
  ctr task kill --signal SIGTERM "$name"
  end_vm 0
}

kill_ends_the_machine_at_once() {
  new_name
  local image=vm-raw
  start_image
  ctr task kill --signal SIGKILL "$name"
  end_vm 137
}

# The guest writes more than a pipe holds while its client does not read, and continues. Filling the machine's buffer
# too would take minutes here.
console_without_a_reader_does_not_stall_the_guest() {
  new_name
  local image=vm-raw
  start_image
  # The client passes the command on before it stops.
  echo 'echo begins; sleep 2; head -c 70000 /dev/zero | tr "\0" x; echo; echo done >/flood; sync; echo flood: over' >&"$console_input"
  wait_for_console begins
  kill -STOP "$client"
  local deadline=$((SECONDS + 120)) state
  while
    state=$(containerd-shim-nutshell-v2 inspect "$name" | awk '$1 == "serial" { print $6 }')
    ((${state:-0} < 70000))
  do
    ((SECONDS < deadline)) || return 1
    read -r -t 0.5 -u "$never" || true
  done
  kill -CONT "$client"
  wait_for_console 'flood: over'
  assert_equal done "$(in_guest 'cat /flood')"
  ctr task kill --signal SIGTERM "$name"
  end_vm 0
}

exec_fails_at_once_and_names_the_console() {
  new_name
  local image=vm-raw start error
  start_image
  start=$SECONDS
  error=$(ctr task exec --exec-id e "$name" true 2>&1) && return 1
  ((SECONDS - start <= 2))
  assert_contains "$error" "neither nutshell's agent nor the QEMU guest agent answers. Use its console"
  assert_equal 2 "$(ctr task ps "$name" | wc -l)"
  assert_contains "$(containerd-shim-nutshell-v2 inspect "$name")" "root "
  assert_contains "$(ctr task metrics "$name")" memory
  ctr task kill --signal SIGKILL "$name"
  end_vm 137
}

# The guest runs QEMU's agent.
exec_runs_by_the_guest_agent() {
  new_name
  local image=vm-raw output status=0 deadline=$((SECONDS + 60))
  start_image
  in_guest start-agent
  until containerd-shim-nutshell-v2 inspect "$name" | grep -q '^guest agent: *QEMU [0-9]'; do
    ((SECONDS < deadline)) || return 1
    read -r -t 0.2 -u "$never" || true
  done
  output=$(timeout 60 ctr task exec --exec-id e1 --cwd /tmp "$name" sh -c 'pwd; echo wrong >&2; exit 3' </dev/null 2>/run/tmp/errors) ||
    status=$?
  assert_equal "3 /tmp" "$status $output"
  assert_equal wrong "$(</run/tmp/errors)"
  assert_equal typed "$(echo typed | timeout 60 ctr task exec --exec-id e2 "$name" cat)"
  output=$(timeout 60 ctr task exec --exec-id e3 "$name" /nosuch </dev/null 2>&1) && return 1
  assert_contains "$output" "the QEMU guest agent refuses guest-exec"
  assert_contains "$output" "No such file or directory"

  timeout 120 ctr task exec --exec-id e4 "$name" sleep 1000 </dev/null &
  local exec=$!
  until in_guest 'pidof sleep' >/dev/null; do
    ((SECONDS < deadline)) || return 1
  done
  ctr task kill --exec-id e4 --signal SIGKILL "$name"
  status=0
  wait "$exec" || status=$?
  assert_equal 137 "$status"
  in_guest '! pidof sleep'
  assert_equal 2 "$(ctr task ps "$name" | wc -l)"
  rm /run/tmp/errors
  ctr task kill --signal SIGTERM "$name"
  end_vm 0
}

# refused_vm EXPECTED ROOTFS [OPTION...]: checks that a VM with this root directory is refused with this text.
refused_vm() {
  local expected=$1 rootfs=$2 error
  shift 2
  new_name
  error=$(ctr run --runtime "$runtime" --rootfs "$@" "$rootfs" "$name" vm 2>&1) && return 1
  assert_contains "$error" "$expected"
  ctr container delete "$name" 2>/dev/null || true
}

unusable_images_are_refused_with_the_reason() {
  local root=/run/tmp/image
  mkdir -p $root/disk
  refused_vm "/disk of the image: it is empty" $root
  touch $root/disk/{a,b}.raw
  refused_vm "contains a.raw, b.raw" $root
  rm $root/disk/*
  ln -s /etc/passwd $root/disk/link.raw
  refused_vm "/disk/link.raw of the image: it is a symbolic link" $root
  rm $root/disk/*
  mknod $root/disk/device.raw b 7 0
  refused_vm "/disk/device.raw of the image: it is a device node" $root
  rm $root/disk/*
  mkfifo $root/disk/pipe.raw
  refused_vm "/disk/pipe.raw of the image: it is a fifo" $root
  rm $root/disk/*
  mkdir $root/disk/folder
  refused_vm "/disk/folder of the image: it is a directory" $root
  rmdir $root/disk/folder
  qemu-img create -q -f qcow2 -b /etc/passwd -F raw $root/disk/disk.qcow2 1M
  refused_vm "backing file" $root
  rm $root/disk/*
  truncate -s 4M $root/disk/empty.raw
  refused_vm "no kernel to boot was found" $root
  refused_vm "annotation io.containerd.nutshell.vm.on-rebot: unknown" $root \
    --annotation io.containerd.nutshell.vm.on-rebot=exit
  mkdir /run/tmp/empty
  refused_vm "disk data: no disk.img is in the volume, and it is empty" $root \
    --mount type=bind,src=/run/tmp/empty,dst=/disks/data,options=rbind
  refused_vm "user-data" $root --mount type=bind,src=/run/tmp/empty,dst=/cloud-init,options=rbind
  rmdir /run/tmp/empty
  rm -r $root
}

# A disk that was made to mislead the disk reader ends Create or Start in time, and leaves nothing.
damaged_disks_are_refused_in_time() {
  local root=/run/tmp/image disk=/run/tmp/image/disk/disk.raw source kernel start=$SECONDS
  source=$(find /run/containerd-root -path '*/fs/disk/disk.raw' -print -quit)
  mkdir -p $root/disk
  new_disk() { rm -f $root/.nutshell-disk-writes && cp --sparse=always "$source" $disk; }
  # The file system's tables are random bytes.
  new_disk
  dd if=/dev/urandom of=$disk bs=4096 seek=257 count=2048 conv=notrunc status=none
  refused_vm "no kernel to boot was found" $root
  # The kernel is a text.
  new_disk
  kernel=$(debugfs -R 'ls -p /boot' "$disk?offset=1048576" 2>/dev/null | sed -n 's|.*/\(vmlinuz-[^/]*\)/.*|\1|p')
  echo "not a kernel" >/run/tmp/text
  debugfs -w -f - "$disk?offset=1048576" >/dev/null 2>&1 <<COMMANDS
rm /boot/$kernel
write /run/tmp/text /boot/$kernel
COMMANDS
  refused_vm kernel $root
  # The table of partitions names more than the disk has.
  new_disk
  truncate -s 2M $disk
  refused_vm "no kernel to boot was found" $root
  ((SECONDS - start < 120))
  rm -r $root /run/tmp/text
}

# A kernel that panics at once resets its machine again and again, although its command line has no "panic=": each boot
# waits longer, each panic is in the log, and the task can be killed.
reboot_loop_is_slowed_down() {
  new_name
  local folder first
  folder=$(echo "$kernels"/6.12*)
  mkdir -p /run/tmp/kernel /run/tmp/image
  cp "$folder/kernel" "$folder/initramfs" /run/tmp/kernel
  start_vm --rootfs --mount type=bind,src=/run/tmp/kernel,dst=/kernel,options=rbind:ro \
    --annotation io.containerd.nutshell.vm.kernel=kernel --annotation io.containerd.nutshell.vm.initrd=initramfs \
    --annotation "io.containerd.nutshell.vm.kernel-arguments=rdinit=/nosuch root=/nosuch" /run/tmp/image --
  wait_for_console "Kernel panic" 1
  first=$SECONDS
  wait_for_console "Kernel panic" 4
  # 0.5, 1 and 2 s.
  ((SECONDS - first >= 3))
  (($(grep -c "task $name: .*after its kernel has panicked: Kernel panic - not syncing: " /run/containerd.log) >= 3))
  assert_equal RUNNING "$(ctr task ls | awk -v name="$name" '$1 == name { print $3 }')"
  ctr task kill --signal SIGKILL "$name"
  end_vm 137
  rm -r /run/tmp/kernel /run/tmp/image
}

kernel_and_initrd_of_a_mount_boot_without_a_disk() {
  new_name
  local folder
  folder=$(echo "$kernels"/6.12*)
  mkdir -p /run/tmp/kernel /run/tmp/image
  cp "$folder/kernel" "$folder/initramfs" /run/tmp/kernel
  start_vm --rootfs --mount type=bind,src=/run/tmp/kernel,dst=/kernel,options=rbind:ro \
    --annotation io.containerd.nutshell.vm.kernel=kernel --annotation io.containerd.nutshell.vm.initrd=/initramfs \
    --annotation io.containerd.nutshell.vm.kernel-arguments=quiet /run/tmp/image --
  wait_for_console 'ready: 6.12'
  assert_contains "$(in_guest 'cat /proc/cmdline')" "console=ttyS0 quiet"
  echo 'poweroff -f' >&"$console_input"
  end_vm 0
  rm -r /run/tmp/kernel /run/tmp/image
}

# The snapshot is full: the guest gets an error for its write, and continues.
full_snapshot_is_only_an_io_error_in_the_guest() {
  new_name
  local root=/run/tmp/image disk
  mkdir -p $root
  mount -t tmpfs -o size=64M tmpfs $root
  disk=$(find /run/containerd-root -path '*/fs/disk/disk.raw' -print -quit)
  mkdir $root/disk
  cp --sparse=always "$disk" $root/disk/disk.raw
  start_vm --rootfs $root --
  wait_for_console "ready: "
  head -c 64M /dev/zero >$root/fill 2>/dev/null || true
  in_guest 'dd if=/dev/urandom of=/data bs=1M count=6 conv=fsync 2>&1 || echo failed' >/run/tmp/output
  assert_contains "$(</run/tmp/output)" failed
  assert_contains "$(in_guest 'echo alive')" alive
  rm $root/fill /run/tmp/output
  ctr task kill --signal SIGKILL "$name"
  end_vm 137
  umount $root
  rmdir $root
}

# volume_disk FOLDER SIZE: makes a volume with a raw disk that has a file system.
volume_disk() {
  mkdir -p "$1"
  truncate -s "$2" "$1/disk.img"
  mkfs.ext4 -q "$1/disk.img"
}

# A writable disk in a volume, a blank disk, an image whose writes are removed with the task, the keys of a ConfigMap, a
# seed, and shared folders.
volumes_are_disks_seed_and_shared_folders() {
  new_name
  local image=vm-raw volumes=/run/tmp/volumes disks
  volume_disk $volumes/data 8M
  mkdir $volumes/{blank,tools,seed,shared}
  qemu-img create -q -f qcow2 $volumes/tools/tools.qcow2 16M
  printf '#cloud-config\n' >$volumes/seed/user-data
  echo of the host >$volumes/shared/file
  mkdir $volumes/inner $volumes/outer
  echo of the inner volume >$volumes/inner/file
  # As the kubelet makes a ConfigMap.
  mkdir -p $volumes/config/..1
  echo of the key >$volumes/config/..1/greeting
  ln -s ..1 $volumes/config/..data
  ln -s ..data/greeting $volumes/config/greeting
  local mounts=(--mount "type=bind,src=$volumes/data,dst=/disks/data,options=rbind:rw"
    --mount "type=bind,src=$volumes/blank,dst=/disks/scratch,options=rbind:rw"
    --mount "type=bind,src=$volumes/tools,dst=/disks/tools,options=rbind:ro"
    --mount "type=bind,src=$volumes/config,dst=/disks/config,options=rbind:ro"
    --mount "type=bind,src=$volumes/seed,dst=/cloud-init,options=rbind:ro"
    --mount "type=bind,src=$volumes/shared,dst=/srv/shared,options=rbind:ro"
    --mount "type=bind,src=$volumes/inner,dst=/srv/outer/inner,options=rbind:ro"
    --mount "type=bind,src=$volumes/outer,dst=/srv/outer,options=rbind:rw"
    --annotation io.containerd.nutshell.vm.disk.scratch=blank,size=32Mi)
  start_image "${mounts[@]}"
  disks=$(in_guest 'for disk in /sys/block/vd*; do echo "$(cat $disk/serial) $(cat $disk/size) $(cat $disk/ro)"; done' | tr '\n' ,)
  assert_contains "$disks" "root 98304 0,data 16384 0,scratch 65536 0,tools 32768 0,config 8 1,seed "
  assert_contains "$(in_guest 'findfs LABEL=CONFIG; findfs LABEL=CIDATA' | tr '\n' ,)" /dev/vde,/dev/vdf
  # The guest has no driver for FAT.
  in_guest 'grep -q "of the key" /dev/vde'
  in_guest 'mount -t ext4 /dev/vdb /mnt && echo of the guest >/mnt/file && umount /mnt'
  in_guest 'mkdir -p /shared && mount -t virtiofs nutshell /shared'
  assert_equal "of the host" "$(in_guest 'cat /shared/srv/shared/file')"
  ! in_guest 'touch /shared/srv/shared/other' || return 1
  assert_equal "of the inner volume" "$(in_guest 'cat /shared/srv/outer/inner/file')"
  assert_system_call_lists vmm/nutshell-vmm "vmm/vcpu 0" vmm/block "vmm/disk sizes" fs/vring_worker
  # The guest resets the device of the shared directories, and goes on.
  in_guest 'umount /shared && (cd /sys/bus/virtio/drivers/virtiofs && echo virtio[0-9]* >unbind)'
  # A disk that a machine writes belongs to it.
  local error
  error=$(ctr run --runtime "$runtime" --mount "type=bind,src=$volumes/data,dst=/disks/data,options=rbind:rw" \
    "localhost/$image:latest" "$name-2" vm 2>&1) && return 1
  assert_contains "$error" "disk.img is locked: another virtual machine uses it"
  ctr container delete "$name-2" 2>/dev/null || true
  assert_equal alive "$(in_guest 'sleep 2; echo alive')"
  ctr task kill --signal SIGTERM "$name"
  end_vm 0
  assert_equal "of the guest" "$(debugfs -R 'cat /file' $volumes/data/disk.img 2>/dev/null)"
  assert_equal $((32 << 20)) "$(stat -c %s $volumes/blank/disk.img)"
  rm -r $volumes
}

# disk_sizes: the serial and the size in sectors of each disk of the guest, separated by commas.
disk_sizes() {
  in_guest 'for disk in /sys/block/vd*; do echo "$(cat $disk/serial) $(cat $disk/size)"; done' | tr '\n' ,
}

# A block device is a disk with the last part of its path as its serial. It grows while the guest runs, and so does the
# disk of a volume.
block_device_is_a_disk_and_disks_grow_while_the_guest_runs() {
  new_name
  local image=vm-raw folder=/run/tmp/growth device serial error deadline
  mkdir -p $folder/data
  truncate -s 8M $folder/device $folder/data/disk.img
  device=$(losetup --find --show $folder/device)
  serial=${device##*/}
  start_image --device "$device" --mount type=bind,src=$folder/data,dst=/disks/data,options=rbind:rw
  assert_contains "$(disk_sizes)" "data 16384,$serial 16384,"
  error=$(ctr run --runtime "$runtime" --device "$device" "localhost/$image:latest" "$name-2" vm 2>&1) && return 1
  assert_contains "$error" "disk $serial: block device"
  assert_contains "$error" "Device or resource busy"
  ctr container delete "$name-2" 2>/dev/null || true

  truncate -s 16M $folder/device $folder/data/disk.img
  losetup --set-capacity "$device"
  deadline=$((SECONDS + 60))
  until [[ $(disk_sizes) == *"data 32768,$serial 32768,"* ]]; do
    ((SECONDS < deadline)) || return 1
    read -r -t 0.5 -u "$never" || true
  done
  # In the last MiB, which was not there when the guest started.
  in_guest 'for disk in vdb vdc; do echo of the guest | dd of=/dev/$disk bs=1M seek=15 conv=fsync,notrunc 2>/dev/null; done'
  # A disk never shrinks.
  truncate -s 15M $folder/data/disk.img
  until grep -q "its file has shrunk to 15728640 bytes" /run/containerd.log; do
    ((SECONDS < deadline)) || return 1
    read -r -t 0.5 -u "$never" || true
  done
  assert_contains "$(disk_sizes)" "data 32768,"
  ctr task kill --signal SIGTERM "$name"
  end_vm 0
  losetup --detach "$device"
  assert_equal "of the guest" "$(tail -c 1M $folder/device | head -n 1 | tr -d '\0')"
  rm -r $folder
}

# The root is a volume: a later task continues with what an earlier one has written.
volume_is_the_boot_disk_and_persists() {
  local volume=/run/tmp/volume root=/run/tmp/image boot
  mkdir -p $volume $root
  cp --sparse=always "$(find /run/containerd-root -path '*/fs/disk/disk.raw' -print -quit)" $volume/disk.img
  for boot in 1 2; do
    new_name
    start_vm --rootfs --mount type=bind,src=$volume,dst=/disks/system,options=rbind:rw \
      --annotation io.containerd.nutshell.vm.disk.system=boot $root --
    wait_for_console "ready: .* boot $boot"
    ctr task kill --signal SIGTERM "$name"
    end_vm 0
  done
  # The container's user may not open the disk of root.
  chmod 600 $volume/disk.img
  refused_vm "cannot be opened by the user 1234" $root --user 1234:1234 \
    --mount type=bind,src=$volume,dst=/disks/system,options=rbind:rw \
    --annotation io.containerd.nutshell.vm.disk.system=boot
  rm -r $volume $root
}

# Runs the commands of docs/MIGRATE.md literally: the blocks for the shell, then the init container's command. The disk
# is a chain of two files, and each has a part of the content.
commands_for_migration_boot_the_disk() {
  local folder=/run/tmp/migration page=$lab/../../docs/MIGRATE.md command image=debian
  mkdir -p $folder/{exports,claim,image}
  cd $folder/exports
  qemu-img convert -f raw -O qcow2 "$(find /run/containerd-root -path '*/fs/disk/disk.raw' -print -quit)" base.qcow2
  qemu-img create -q -f qcow2 -b base.qcow2 -F qcow2 vm1.qcow2
  # Behind the partition.
  qemu-io -f qcow2 -c 'write -q -P 0x61 47M 512' vm1.qcow2
  sed -n '/^```sh$/,/^```$/{/^```/!p}' "$page" >/run/tmp/commands
  assert_equal 5 "$(wc -l </run/tmp/commands)"
  bash -e /run/tmp/commands
  rm base.qcow2 vm1.qcow2

  new_name
  readarray -t command < <(sed -n 's/^    command: \(\["sh".*\)/\1/p' "$page" | python3 -c '
import json, sys
print("\n".join(json.load(sys.stdin)))')
  assert_equal 3 "${#command[@]}"
  nutshell "$name" --rm --mount "type=bind,src=$PWD,dst=/source,options=rbind:ro" \
    --mount "type=bind,src=$folder/claim,dst=/disks/system,options=rbind:rw" -- "${command[@]}"
  assert_equal disk.img "$(ls $folder/claim)"
  new_name
  start_vm --rootfs --mount type=bind,src=$folder/claim,dst=/disks/system,options=rbind:rw \
    --annotation io.containerd.nutshell.vm.disk.system=boot $folder/image --
  wait_for_console "ready: "
  assert_equal aaaa "$(in_guest 'dd if=/dev/vda bs=1M skip=47 count=1 2>/dev/null | head -c 4; echo')"
  ctr task kill --signal SIGTERM "$name"
  end_vm 0

  mkdir $folder/image/disk
  mv vm1-disk.qcow2 $folder/image/disk/
  new_name
  start_vm --rootfs $folder/image --
  wait_for_console "ready: "
  assert_equal aaaa "$(in_guest 'dd if=/dev/vda bs=1M skip=47 count=1 2>/dev/null | head -c 4; echo')"
  ctr task kill --signal SIGTERM "$name"
  end_vm 0
  cd /
  rm -r $folder /run/tmp/commands
}

# The disk is in a volume, and its writes are removed with the task. An image has only one file, but the disk's folder
# may have more: an overlay hides them.
disk_boots_and_switches_off() {
  new_name
  local disk=$1 folder=/run/tmp/disk file pattern=' login: '
  [[ ! -e ${disk%.*}.expect ]] || pattern=$(<"${disk%.*}.expect")
  mkdir -p $folder/{upper,work,volume,root}
  mount -t overlay -o "lowerdir=$(dirname "$disk"),upperdir=$folder/upper,workdir=$folder/work" overlay $folder/volume
  for file in $folder/volume/*; do [[ ${file##*/} == "${disk##*/}" ]] || rm -r "$file"; done
  start_vm --rootfs --memory-limit $((2 << 30)) --cpus 2 --annotation io.containerd.nutshell.vm.disk.system=boot \
    --mount type=bind,src=$folder/volume,dst=/disks/system,options=rbind:ro $folder/root --
  wait_for_console "$pattern"
  ctr task kill --signal SIGTERM "$name"
  end_vm 0
  umount $folder/volume
  rm -r $folder
}

# Run by CI, with the images vm-raw and vm-zstd.
vm_cases() {
  check "qcow2 disk with zstd boots" qcow2_disk_with_zstd_boots
  check "reboot in the guest boots the same disk again" reboot_in_the_guest_boots_the_same_disk_again
  check "unusable images are refused with the reason" unusable_images_are_refused_with_the_reason
  check "kernel and initrd of a mount boot without a disk" kernel_and_initrd_of_a_mount_boot_without_a_disk
  check "volumes are disks, seed and shared folders" volumes_are_disks_seed_and_shared_folders
}

# Left to `make soak`, with the images debian and vm-qcow2 too.
soak_vm_cases() {
  check "raw disk boots" raw_disk_boots
  check "qcow2 disk with zlib boots" qcow2_disk_with_zlib_boots
  check "reboot ends the task if on-reboot is exit" reboot_ends_the_task_if_on_reboot_is_exit
  check "SIGTERM during the first boot has no effect" sigterm_during_the_first_boot_has_no_effect
  check "kill ends the machine at once" kill_ends_the_machine_at_once
  check "console without a reader does not stall the guest" console_without_a_reader_does_not_stall_the_guest
  check "exec fails at once and names the console" exec_fails_at_once_and_names_the_console
  check "exec runs by the guest agent" exec_runs_by_the_guest_agent
  check "full snapshot is only an I/O error in the guest" full_snapshot_is_only_an_io_error_in_the_guest
  check "damaged disks are refused in time" damaged_disks_are_refused_in_time
  check "reboot loop is slowed down" reboot_loop_is_slowed_down
  check "volume is the boot disk and persists" volume_is_the_boot_disk_and_persists
  check "block device is a disk, and disks grow while the guest runs" block_device_is_a_disk_and_disks_grow_while_the_guest_runs
  check "commands for migration boot the disk" commands_for_migration_boot_the_disk
}
