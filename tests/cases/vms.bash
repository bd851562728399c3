# Virtual machines that boot the disk in their image. Sourced by tests/suites/*.sh, after cases/containers.bash.
#
# The disks are those of tests/images/disk: their init prints a line that begins with "ready:", and executes the lines of
# the console.

# The tasks of VMs write to $console_output and read from the descriptor $console_input.
console=/run/tmp/console

# start_vm [OPTION...] -- [WORD...]: starts the VM $name from the image $image as a client in the background, whose pid is
# $client. The words are the command, `vm` if there are none.
start_vm() {
  local options=()
  while [[ $1 != -- ]]; do
    options+=("$1")
    shift
  done
  shift
  (($#)) || set -- vm
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
  local deadline=$((SECONDS + 120))
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

# The guest keeps the data that it has written, and a changed boot loader configuration takes effect.
reboot_in_the_guest_boots_the_same_disk_again() {
  new_name
  local image=vm-raw vmm again
  start_image --memory-limit 268435456 --cpus 2
  vmm=$(pids_of vmm)
  assert_equal 2 "$(in_guest nproc)"
  in_guest 'sed -i "s/ quiet / quiet nutshell.marker=1 /" /boot/grub/grub.cfg && sync'
  echo 'reboot -f' >&"$console_input"
  wait_for_console 'ready: .* boot 2'
  assert_contains "$(in_guest 'cat /proc/cmdline')" "nutshell.marker=1"
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

kill_ends_the_machine_at_once() {
  new_name
  local image=vm-raw
  start_image
  ctr task kill --signal SIGKILL "$name"
  end_vm 137
}

# The guest writes more than all buffers hold while its client does not read, and continues: the oldest output is lost.
console_without_a_reader_does_not_stall_the_guest() {
  new_name
  local image=vm-raw
  start_image
  kill -STOP "$client"
  echo 'head -c 500000 /dev/zero | tr "\0" x; echo; echo done >/flood; sync; echo flood: over' >&"$console_input"
  local deadline=$((SECONDS + 120)) state
  while
    state=$(containerd-shim-nutshell-v2 inspect "$name" | awk '$1 == "serial" { print $6 }')
    ((${state:-0} < 500000))
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
  assert_contains "$error" "it has no agent. Use its console"
  assert_equal 2 "$(ctr task ps "$name" | wc -l)"
  assert_contains "$(containerd-shim-nutshell-v2 inspect "$name")" "nutshell-0"
  assert_contains "$(ctr task metrics "$name")" memory
  ctr task kill --signal SIGKILL "$name"
  end_vm 137
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
  refused_vm "/disk/link.raw is a symbolic link" $root
  rm $root/disk/*
  mknod $root/disk/device.raw b 7 0
  refused_vm "/disk/device.raw is a device node" $root
  rm $root/disk/*
  qemu-img create -q -f qcow2 -b /etc/passwd -F raw $root/disk/disk.qcow2 1M
  refused_vm "backing file" $root
  rm $root/disk/*
  truncate -s 4M $root/disk/empty.raw
  refused_vm "no kernel to boot was found on the disk" $root
  refused_vm "annotation io.containerd.nutshell.vm.on-rebot: unknown" $root \
    --annotation io.containerd.nutshell.vm.on-rebot=exit
  refused_vm "mounts: /data: a virtual machine has no mounts except /kernel" $root \
    --mount type=bind,src=/run/tmp,dst=/data,options=rbind
  rm -r $root
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
  local root=/run/tmp/image archive
  mkdir -p $root
  mount -t tmpfs -o size=64M tmpfs $root
  archive=$(find /run/containerd-root -path '*/fs/disk/disk.raw' -print -quit)
  mkdir $root/disk
  cp --sparse=always "$archive" $root/disk/disk.raw
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
