# A containerd for tests, inside the lab machine: set_up_containerd (configuration, start, images), start_containerd and
# stop_containerd (the process only), remove_containerd (the process and all data). Sourced by test.bash, by
# first-container and first-vm, and by the measurements in benches/.

lab=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# A descriptor that never becomes readable: `read -t SECONDS -u "$never"` waits without starting a process.
exec {never}<> <(:)

# set_up_containerd [-c] VERSION [IMAGE...]
#
# Configures and starts containerd 2.1 or 1.7 on its default socket, so that `ctr` needs no address, with its state in
# memory, and imports images (tests/images/build lists them). Exits if containerd does not start.
#
#   -c  enables the CRI service and imports the images into its namespace
#
# The shim under test, NUTSHELL_TEST_SHIM, is copied to the PATH of containerd. CONTAINERD_CONFIG is appended to
# the configuration, whose version is CONTAINERD_CONFIG_VERSION, 2 if not set.
set_up_containerd() {
  local cri='' version folder images image program
  [[ $1 != -c ]] || {
    cri=1
    shift
  }
  version=$1
  shift
  folder=$("$lab/containerd" "$version")
  for program in "$folder"/{containerd,containerd-shim-runc-v2,ctr} ${NUTSHELL_TEST_SHIM:+"$NUTSHELL_TEST_SHIM"}; do
    cp "$program" /run/bin/
  done
  copy_to_memory runc

  # Plugins that no test uses slow down the start.
  local disabled=(io.containerd.snapshotter.v1.{btrfs,zfs,aufs} io.containerd.internal.v1.opt
    io.containerd.nri.v1.nri io.containerd.tracing.processor.v1.otlp io.containerd.internal.v1.tracing)
  [[ -n $cri ]] || disabled+=(io.containerd.grpc.v1.cri io.containerd.cri.v1.{images,runtime}
    io.containerd.podsandbox.controller.v1.podsandbox io.containerd.sandbox.controller.v1.podsandbox)
  # containerd and runc create these folders and never remove them: host_state must list them from the start.
  mkdir -p /run/containerd-root /run/containerd/{fifo,s,runc/default,io.containerd.runtime.v2.task/default}
  {
    printf 'version = %s\n' "${CONTAINERD_CONFIG_VERSION:-2}"
    printf 'root = "/run/containerd-root"\nstate = "/run/containerd"\ndisabled_plugins = ['
    printf '"%s", ' "${disabled[@]}"
    printf ']\n'
    [[ -z ${CONTAINERD_CONFIG:-} ]] || printf '%s\n' "$CONTAINERD_CONFIG"
  } >/run/containerd.toml

  # containerd runs in its own cgroup, as on a node. /default is the parent of the cgroups of ctr's containers. No
  # runtime removes it, because others may use it, so it is created here and does not count as a leftover of a test.
  mkdir -p /sys/fs/cgroup/containerd /sys/fs/cgroup/default
  : >/run/containerd.log
  start_containerd || exit 1

  (($#)) || return 0
  images=$("$lab/../images/build" "$@")
  for image; do
    ctr ${cri:+-n k8s.io} image import --no-unpack "$images/$image.tar" >/dev/null || exit 1
  done
}

# Starts the containerd that set_up_containerd has configured, also after it was killed. Returns when it is ready.
start_containerd() {
  local from pid
  from=$(stat -c %s /run/containerd.log)
  (
    echo "$BASHPID" >/sys/fs/cgroup/containerd/cgroup.procs
    exec containerd --config /run/containerd.toml
  ) >>/run/containerd.log 2>&1 &
  pid=$!
  echo "$pid" >/run/containerd.pid
  # Otherwise bash would print a message when a signal kills containerd, and tests do that on purpose.
  disown "$pid"
  grep -q -m 1 'containerd successfully booted' \
    < <(tail -c "+$((from + 1))" -f --pid="$pid" /run/containerd.log) || {
    echo "containerd did not start:" >&2
    tail -n 20 /run/containerd.log >&2
    return 1
  }
}

# stop_containerd [SIGNAL]: ends only the containerd process, by SIGNAL, TERM if none is given. Its data is kept.
stop_containerd() {
  local pid
  pid=$(</run/containerd.pid)
  kill "-${1:-TERM}" "$pid"
  # `wait` is not possible: containerd may have been started by a shell that has ended.
  while [[ -e /proc/$pid ]]; do read -r -t 0.05 -u "$never" || true; done
  rm /run/containerd.pid
}

# Ends containerd and removes its images, snapshots and state.
remove_containerd() {
  [[ -e /run/containerd.pid ]] || return 0
  stop_containerd
  local mount
  while read -r mount; do
    umount "$mount"
  done < <(awk '$5 ~ "^/run/containerd" { print $5 }' /proc/self/mountinfo | sort -r)
  rm -rf /run/containerd /run/containerd-root
  rmdir /sys/fs/cgroup/default /sys/fs/cgroup/containerd
}
