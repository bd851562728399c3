# Records which system calls the threads of nutshell's confined processes make, with the kernel's event histograms.
# Sourced by test.bash if NUTSHELL_TEST_SYSCALLS is set; tests/run adds the record to that file. tests/syscalls
# compares it with the lists that `check --system-calls` prints.

tracing=/sys/kernel/tracing
# By thread name. The kernel knows a process's main thread by the name that `jail::enter` sets.
traced_threads=(nutshell-vmm 'vcpu*' net block unplug 'disk sizes' nutshell-fs vhost-user vring_worker sync standby nutshell-disk
  nutshell-holder)

# Arguments that the lists check: event and field.
traced_arguments=(
  ioctl:cmd mmap:prot mmap:flags mprotect:prot madvise:behavior prctl:option fcntl:cmd fallocate:mode
  unshare:unshare_flags clone:clone_flags membarrier:cmd socket:family recvmsg:flags sendmsg:flags
)

# start_recording: records from now on.
start_recording() {
  local thread filter='' argument
  mountpoint -q "$tracing" || mount -t tracefs tracefs "$tracing"
  for thread in "${traced_threads[@]}"; do filter+="${filter:+ || }comm ~ \"$thread\""; done
  echo "hist:keys=common_pid.execname,id:size=131072 if $filter" >"$tracing/events/raw_syscalls/sys_enter/trigger"
  for argument in "${traced_arguments[@]}"; do
    echo "hist:keys=common_pid.execname,${argument#*:}.hex:size=16384 if $filter" \
      >"$tracing/events/syscalls/sys_enter_${argument%:*}/trigger"
  done
}

# print_recorded: prints one line for each thread name and call, "THREAD NUMBER", and for each value of a recorded
# argument, "THREAD CALL.FIELD VALUE". Blanks and numbers of thread names are left out ("vcpu 0" is "vcpu").
print_recorded() {
  local argument
  sed -n 's/^{ common_pid: \(.*[^ ]\) *\[ *[0-9]*\], id: *\([0-9]*\) }.*/\1|\2/p' \
    "$tracing/events/raw_syscalls/sys_enter/hist"
  for argument in "${traced_arguments[@]}"; do
    sed -n "s/^{ common_pid: \(.*[^ ]\) *\[ *[0-9]*\], ${argument#*:}: *\([0-9a-f]*\) }.*/\1|${argument/:/.} \2/p" \
      "$tracing/events/syscalls/sys_enter_${argument%:*}/hist"
  done
  grep -h '^ *Dropped: [1-9]' "$tracing"/events/raw_syscalls/sys_enter/hist >&2 || true
}

# sorted_record: the record, each line once.
sorted_record() {
  print_recorded | awk -F'|' '{ gsub(/[ 0-9]/, "", $1); print $1, $2 }' | sort -u
}
