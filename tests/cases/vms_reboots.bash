# Reboots in the guest of a virtual machine. Sourced by tests/suites/*.sh, after cases/vms.bash.

# The guest installs another kernel, with its initramfs and its entry in grub.cfg.
kernel_that_the_guest_installs_is_booted_at_the_next_reboot() {
  new_name
  local image=vm-raw before folder release
  folder=$(echo "$kernels"/6.1.*)
  release=$(basename "$folder")
  start_image --mount "type=bind,src=$folder,dst=/new,options=rbind:ro"
  before=$(checksum_of_base)
  assert_contains "$(in_guest 'uname -r')" 6.12.
  in_guest 'mkdir -p /shared && mount -t virtiofs nutshell /shared'
  in_guest "cp /shared/new/kernel /boot/vmlinuz-$release && cp /shared/new/initramfs /boot/initrd.img-$release"
  in_guest "sed -i 's/vmlinuz-[^ ]*/vmlinuz-$release/; s/initrd.img-[^ ]*/initrd.img-$release/' /boot/grub/grub.cfg && sync"
  echo 'reboot -f' >&"$console_input"
  wait_for_console "ready: $release .* boot 2"
  assert_equal "$release" "$(in_guest 'uname -r')"
  # The old kernel is still there: the guest goes back.
  in_guest "cd /boot && old=\$(ls vmlinuz-6.12*) && sed -i \"s/$release/\${old#vmlinuz-}/\" grub/grub.cfg && sync; cd /"
  echo 'reboot -f' >&"$console_input"
  wait_for_console "ready: 6.12.* boot 3"
  ctr task kill --signal SIGTERM "$name"
  end_vm 0
  assert_equal "$before" "$(checksum_of_base)"
}

blank_disk_survives_a_reboot_in_the_guest() {
  new_name
  local image=vm-raw volume=/run/tmp/blank
  mkdir $volume
  start_image --mount type=bind,src=$volume,dst=/disks/scratch,options=rbind:rw \
    --annotation io.containerd.nutshell.vm.disk.scratch=blank,size=32Mi
  assert_contains "$(disk_sizes)" "scratch 65536,"
  in_guest 'echo of the first boot | dd of=/dev/vdb bs=1M seek=31 conv=fsync,notrunc 2>/dev/null'
  echo 'reboot -f' >&"$console_input"
  wait_for_console "ready: .* boot 2"
  assert_contains "$(disk_sizes)" "scratch 65536,"
  assert_equal "of the first boot" "$(in_guest 'dd if=/dev/vdb bs=1M skip=31 2>/dev/null | head -n 1')"
  ctr task kill --signal SIGTERM "$name"
  end_vm 0
  assert_equal "disk.img $((32 << 20))" "$(stat -c '%n %s' $volume/* | sed 's|.*/||')"
  rm -r $volume
}

vm_reboot_cases() {
  check "kernel that the guest installs is booted at the next reboot" \
    kernel_that_the_guest_installs_is_booted_at_the_next_reboot
  check "blank disk survives a reboot in the guest" blank_disk_survives_a_reboot_in_the_guest
}
