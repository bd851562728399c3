# Virtual machines whose disk or guest is damaged or hostile. Sourced by tests/suites/*.sh, after cases/vms.bash.

# refused_disk EXPECTED: checks that a VM with the image in /run/tmp/image is refused with this text after the file's
# name.
refused_disk() {
  refused_vm "cannot read the disk /disk/disk.qcow2: cannot build the virtual machine: disk nutshell-0: qcow2 base image: $1" \
    /run/tmp/image
}

# new_qcow2 [OPTION...]: makes a qcow2 image of 1 MiB with these options of qemu-img as the disk of /run/tmp/image.
new_qcow2() {
  rm -rf /run/tmp/image/{disk,.nutshell-disk-writes}
  mkdir -p /run/tmp/image/disk
  qemu-img create -q -f qcow2 "$@" /run/tmp/image/disk/disk.qcow2 1M
}

# patch_qcow2 OFFSET BYTES: overwrites bytes of the disk's header. BYTES are escape sequences of printf.
patch_qcow2() {
  # shellcheck disable=SC2059 # the format is the value
  printf "$2" | dd of=/run/tmp/image/disk/disk.qcow2 bs=1 seek="$1" conv=notrunc status=none
}

# Each row is an image that another program could make, with the text by which it is refused.
qcow2_images_that_cannot_be_used_are_refused_with_the_reason() {
  local secret=(--object secret,id=key,data=secret)
  new_qcow2 -o data_file=/run/tmp/data,data_file_raw=on
  refused_disk 'its data is in another file (incompatible feature bit 2, "external data file")'
  rm /run/tmp/data
  new_qcow2 "${secret[@]}" -o encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=1
  refused_disk "it is encrypted (crypt_method 2, LUKS)"
  # qemu-img makes no such images any more.
  new_qcow2
  patch_qcow2 32 '\0\0\0\1'
  refused_disk "it is encrypted (crypt_method 1, AES)"
  new_qcow2 -o extended_l2=on
  refused_disk "it has extended L2 entries (incompatible feature bit 4)"
  local offset value expected
  while IFS=: read -r offset value expected; do
    new_qcow2
    patch_qcow2 "$offset" "$value"
    refused_disk "$expected"
  done <<'ROWS'
79:\040:it needs the unknown incompatible feature bit 5
72:\200:it needs the unknown incompatible feature bit 63
79:\001:it was not closed by the program that wrote it
79:\002:it is marked as damaged
4:\0\0\0\004:version is 4, and only 2 and 3 are supported
4:\0\0\0\001:version is 1, and only 2 and 3 are supported
20:\0\0\0\050:cluster_bits is 40
24:\177:size is
ROWS
  local size
  for size in 40 80; do
    new_qcow2
    truncate -s $size /run/tmp/image/disk/disk.qcow2
    refused_disk "the file is truncated: it has $size bytes, and the header is at byte 0"
  done
  # An internal snapshot is ignored: the image is refused only because it has no kernel.
  new_qcow2
  qemu-img snapshot -c before /run/tmp/image/disk/disk.qcow2
  refused_vm "no kernel to boot was found" /run/tmp/image
  rm -r /run/tmp/image
}

# resident_memory PID: the memory of a process in KiB, without files and without the guest's memory.
resident_memory() {
  awk '/^RssAnon:/ { print $2 }' "/proc/$1/status"
}

# assert_memory_grows_less_than KIB BEFORE PID...: BEFORE is the sum of resident_memory of these processes.
assert_memory_grows_less_than() {
  local limit=$1 before=$2 pid sum=0
  shift 2
  for pid; do sum=$((sum + $(resident_memory "$pid"))); done
  ((sum - before < limit)) || {
    echo "memory grew from $before to $sum KiB" >&2
    return 1
  }
}

# Makes a program for the guest that writes 1 MiB to the serial port, four bytes at a time. Linux's driver writes one,
# and would take minutes here. Prints its path.
make_flood() {
  as -o /run/tmp/flood.o - <<'ASSEMBLY'
.globl _start
_start:
  mov $173, %eax           # ioperm(0x3f8, 4, 1)
  mov $0x3f8, %edi
  mov $4, %esi
  mov $1, %edx
  syscall
  mov $256, %ebx
1:
  mov $0x3f8, %edx
  lea text(%rip), %rsi
  mov $1024, %ecx
  rep outsl
  dec %ebx
  jnz 1b
  mov $60, %eax            # exit(0)
  xor %edi, %edi
  syscall
text:
  .fill 4095, 1, 'x'
  .byte '\n'
ASSEMBLY
  ld -o /run/tmp/flood /run/tmp/flood.o
  rm /run/tmp/flood.o
  echo /run/tmp/flood
}

# The guest writes 1 MiB, three times as much as the machine's buffer and the pipe hold, while its client does not read.
flooded_console_without_a_reader_neither_stalls_the_guest_nor_grows_the_host() {
  new_name
  local image=vm-raw shim vmm before start deadline serial
  mkdir /run/tmp/tools
  mv "$(make_flood)" /run/tmp/tools/
  start_image --mount type=bind,src=/run/tmp/tools,dst=/tools,options=rbind:ro
  in_guest 'mkdir -p /shared && mount -t virtiofs nutshell /shared && cp /shared/tools/flood /bin/flood'
  shim=$(pids_of shim) vmm=$(pids_of vmm)
  before=$(($(resident_memory "$shim") + $(resident_memory "$vmm")))
  # The client passes the command on before it stops.
  echo 'echo begins; sleep 2; flood; echo; echo "flood is over"' >&"$console_input"
  wait_for_console begins
  kill -STOP "$client"
  deadline=$((SECONDS + 120))
  while
    serial=$(containerd-shim-nutshell-v2 inspect "$name" | awk '$1 == "serial" { print $6 }')
    ((${serial:-0} < 1 << 20))
  do
    ((SECONDS < deadline)) || { echo "the guest wrote ${serial:-0} bytes" >&2; return 1; }
    read -r -t 0.2 -u "$never" || true
  done
  assert_memory_grows_less_than 4096 "$before" "$shim" "$vmm"
  start=$SECONDS
  assert_equal RUNNING "$(ctr task ls | awk -v name="$name" '$1 == name { print $3 }')"
  ((SECONDS - start <= 5))
  # The reader gets the end of the output.
  kill -CONT "$client"
  wait_for_console '^flood is over'
  (($(stat -c %s $console.out) < 640 << 10))
  grep -q "bytes of the console's output are lost" /run/containerd.log

  # The reader does not return until the machine has ended.
  echo 'echo begins again; sleep 2; while true; do flood; done' >&"$console_input"
  wait_for_console 'begins again'
  kill -STOP "$client"
  until (($(containerd-shim-nutshell-v2 inspect "$name" | awk '$1 == "serial" { print $6 }') > serial + (400 << 10))); do
    ((SECONDS < deadline)) || return 1
    read -r -t 0.2 -u "$never" || true
  done
  start=$SECONDS
  ctr task kill --signal SIGKILL "$name"
  wait_for_task "$name" STOPPED
  ((SECONDS - start <= 10))
  kill -CONT "$client"
  end_vm 137
  rm -r /run/tmp/tools
}

hostile_vm_cases() {
  check "qcow2 images that cannot be used are refused with the reason" qcow2_images_that_cannot_be_used_are_refused_with_the_reason
  check "flooded console without a reader neither stalls the guest nor grows the host" \
    flooded_console_without_a_reader_neither_stalls_the_guest_nor_grows_the_host
}
