# A guest's kernel that attacks its machine (tests/hostile/kernel.rs). Sourced by tests/suites/*.sh, after
# cases/containers.bash and cases/vms.bash. $hostile_kernel is its file, and $hostile_seconds how long each board is
# attacked.
#
# The kernel may reset its machine, which ends the machine with a reason, or break all of its devices. But vmm must not
# crash, hang, or use more than a fixed amount of the host's memory, threads and descriptors.

# The guest's memory in MiB.
hostile_memory=128
# What a vmm may use besides: memory in MiB, threads and descriptors.
hostile_limits=(own_memory=24 threads=40 descriptors=160)

# attack START STOP: starts machines by START until $hostile_seconds are over, and watches each until it ends or STOP
# ends it, which may take 5 s. START sets $client.
attack() {
  local end=$((SECONDS + hostile_seconds)) round_end rounds=0 warnings vmm from to logged log=/run/tmp/attack.log
  logged=$(stat -c %s /run/containerd.log)
  while ((SECONDS < end)); do
    rounds=$((rounds + 1))
    new_name
    "$1"
    wait_for_vmm
    # A kernel whose own memory a device has overwritten may do nothing more.
    round_end=$((SECONDS + 30 < end ? SECONDS + 30 : end))
    while [[ -n $vmm && -e /proc/$vmm ]] && ((SECONDS < round_end)); do
      assert_bounded "$vmm"
      read -r -t 1 -u "$never" || true
    done
    from=$EPOCHREALTIME
    "$2"
    until [[ -z $vmm || ! -e /proc/$vmm ]]; do
      to=$EPOCHREALTIME
      ((${to/./} - ${from/./} < 5000000)) || { echo "the machine did not end within 5 s" >&2; return 1; }
      read -r -t 0.1 -u "$never" || true
    done
    after_attack
  done
  tail -c "+$((logged + 1))" /run/containerd.log >$log
  # Only an attack causes these warnings.
  warnings=$(grep -cE 'guest cannot use this device|guest continues without this device|virtqueue is broken' $log || true)
  echo "$rounds machines, $warnings warnings" >&2
  # The end of a vmm by a fault of its own.
  if grep -E 'panicked at|forbidden system call|was killed by signal (4|6|7|8|11)|stack overflow' $log >&2; then
    return 1
  fi
  rm $log
  # At least one in ten seconds.
  ((warnings * 10 >= hostile_seconds)) || { echo "the kernel has hardly run" >&2; return 1; }
}

# Waits until a vmm runs, and sets $vmm to its pid; empty if the client has ended before.
wait_for_vmm() {
  while
    vmm=$(pids_of vmm | tail -n 1)
    [[ -z $vmm && -e /proc/$client ]]
  do
    read -r -t 0.1 -u "$never" || true
  done
}

# own_memory VMM: the anonymous memory of the process in MiB, without the guest's. The guest's memory is shared (sh), or
# the only memory with huge pages (hg).
own_memory() {
  { cat "/proc/$1/smaps" 2>/dev/null || true; } | awk '
    /^Anonymous:/ { anonymous = $2 }
    /^VmFlags:/ && !/ (sh|hg)( |$)/ { sum += anonymous }
    END { print int(sum / 1024) }'
}

# assert_bounded VMM: checks the resources of the process. No-op if it has ended.
assert_bounded() {
  local status own threads descriptors limits
  status=$(cat "/proc/$1/status" 2>/dev/null) && [[ $status == *VmRSS* ]] || return 0
  threads=$(awk '/^Threads/ { print $2 }' <<<"$status")
  descriptors=$({ find "/proc/$1/fd" -mindepth 1 2>/dev/null || true; } | wc -l)
  own=$(own_memory "$1")
  limits=" ${hostile_limits[*]} "
  local name value limit
  for name in own_memory:$own threads:"$threads" descriptors:"$descriptors"; do
    value=${name#*:} name=${name%:*}
    limit=${limits#* "$name"=}
    limit=${limit%% *}
    ((value <= limit)) || { echo "vmm has $name $value, and the limit is $limit" >&2; return 1; }
  done
}

container_with_hostile_kernel() {
  ctr run --rm --snapshotter "$snapshotter" --runtime "$runtime" --runtime-config-path /run/tmp/nutshell.toml \
    --memory-limit $((hostile_memory << 20)) "localhost/$image:latest" "$name" true >/run/tmp/client 2>&1 &
  client=$!
}

# The task is still being created: the client's end cancels that. ctr then leaves its fifos.
cancel_creation() {
  kill "$client" 2>/dev/null || true
  wait "$client" || true
  rm -rf /run/containerd/fifo/*
}

after_attack() {
  wait "$client" || true
  ctr container delete "$name" 2>/dev/null || true
}

hostile_kernel_does_not_harm_the_container_board() {
  printf '[guest]\nkernel = "%s"\nkernel_arguments = "mmio"\n' "$hostile_kernel" >/run/tmp/nutshell.toml
  attack container_with_hostile_kernel cancel_creation
  rm /run/tmp/nutshell.toml /run/tmp/client
}

vm_with_hostile_kernel() {
  start_vm --rootfs --memory-limit $((hostile_memory << 20)) \
    --mount type=bind,src=/run/tmp/kernel,dst=/kernel,options=rbind:ro \
    --mount type=bind,src=/run/tmp/volume,dst=/disks/scratch,options=rbind:rw \
    --mount type=bind,src=/run/tmp/shared,dst=/shared,options=rbind:rw \
    --annotation io.containerd.nutshell.vm.disk.scratch=blank,size=32Mi \
    --annotation io.containerd.nutshell.vm.kernel=kernel --annotation io.containerd.nutshell.vm.on-reboot=exit \
    /run/tmp/image --
}

kill_vm() {
  ctr task kill --signal SIGKILL "$name" 2>/dev/null || true
}

hostile_kernel_does_not_harm_the_pc_board() {
  mkdir -p /run/tmp/{kernel,image,volume,shared}
  cp "$hostile_kernel" /run/tmp/kernel/kernel
  attack vm_with_hostile_kernel kill_vm
  rm -r /run/tmp/{kernel,image,volume,shared} $console.*
}

hostile_kernel_cases() {
  check "hostile kernel does not harm the container board" hostile_kernel_does_not_harm_the_container_board
  check "hostile kernel does not harm the PC board" hostile_kernel_does_not_harm_the_pc_board
}
