# A Docker Engine for tests, inside the lab machine, on the containerd of containerd.bash: set_up_docker (programs,
# start, image), start_docker, stop_docker, remove_docker. Sourced by tests/suites/docker.sh, after test.bash.

# set_up_docker: starts dockerd and creates the image "busybox", after set_up_containerd. Exits if dockerd does not
# start. One container with a network has run when it returns: what the daemon creates once and keeps does not count as
# a leftover of a test.
set_up_docker() {
  local folder archive layer
  folder=$("$lab/docker")
  cp "$folder"/* /run/bin/
  # dockerd runs in its own cgroup, as on a node.
  mkdir -p /sys/fs/cgroup/dockerd /run/docker-root
  : >/run/dockerd.log
  start_docker || exit 1

  # `docker load` cannot read an OCI archive that Docker has not written. The image has one layer, the largest file.
  archive=$("$lab/../images/build" busybox)/busybox.tar
  layer=$(tar -tvf "$archive" | sort -n -k 3 | awk 'END { print $NF }')
  tar -xOf "$archive" "$layer" | docker import --change 'CMD ["/bin/sh"]' --change 'ENV PATH=/bin' - busybox >/dev/null || exit 1
  docker run --rm --runtime "$runtime" busybox true || {
    tail -n 40 /run/containerd.log /run/dockerd.log
    exit 1
  }
  # The daemon mounts the host's network namespace when a container is to have it, also if the runtime refuses that.
  ! docker run --rm --runtime "$runtime" --network host busybox true 2>/dev/null || exit 1
}

# Starts the daemon that set_up_docker has configured, also after it was killed. Returns when it answers. Containers
# survive a restart of the daemon (live restore).
start_docker() {
  local pid
  (
    echo "$BASHPID" >/sys/fs/cgroup/dockerd/cgroup.procs
    exec dockerd --data-root /run/docker-root --exec-root /run/docker --pidfile /run/dockerd.pid \
      --host unix:///run/docker.sock --containerd /run/containerd/containerd.sock --storage-driver overlay2 \
      --live-restore --shutdown-timeout 5
  ) >>/run/dockerd.log 2>&1 &
  pid=$!
  # Otherwise bash would print a message when a signal kills the daemon.
  disown "$pid"
  while ! docker version >/dev/null 2>&1; do
    [[ -e /proc/$pid ]] || {
      echo "dockerd did not start:" >&2
      tail -n 20 /run/dockerd.log >&2
      return 1
    }
    read -r -t 0.1 -u "$never" || true
  done
}

# stop_docker [SIGNAL]: ends only the daemon, by SIGNAL, TERM if none is given. Its containers keep running.
stop_docker() {
  local pid
  pid=$(</run/dockerd.pid)
  kill "-${1:-TERM}" "$pid"
  while [[ -e /proc/$pid ]]; do read -r -t 0.05 -u "$never" || true; done
  rm -f /run/dockerd.pid
}

# Removes all containers, volumes, networks and other data of Docker, and ends the daemon.
remove_docker() {
  local mount
  remove_docker_objects
  stop_docker
  while read -r mount; do
    umount "$mount"
  done < <(awk '$5 ~ "^/run/docker" { print $5 }' /proc/self/mountinfo | sort -r)
  rm -rf /run/docker /run/docker-root
}

# Prints the containers, volumes and networks that Docker has, without its three default networks.
docker_objects() {
  docker container ls --all --format 'container {{.Names}} {{.Status}}'
  docker volume ls --format 'volume {{.Name}}'
  docker network ls --filter type=custom --format 'network {{.Name}}'
}

remove_docker_objects() {
  local kind name
  while read -r kind name _; do
    case $kind in
      container) docker container rm --force --volumes "$name" ;;
      *) docker "$kind" rm --force "$name" ;;
    esac
  done < <(docker_objects) >/dev/null
}

# docker_check NAME COMMAND [ARG...]: `check`, which also asserts that Docker has no container, volume or network left.
# A test that fails prints the daemon's log, and its containers are removed, so that it does not affect the next.
docker_check() {
  local name=$1
  shift
  [[ $name == *"${NUTSHELL_TEST_FILTER:-}"* ]] || return 0
  check "$name" in_docker "$@"
}

in_docker() {
  local status=0 logged left
  logged=$(stat -c %s /run/dockerd.log)
  # Not in a condition: bash would ignore errexit in the test.
  (
    set -e
    "$@"
  ) &
  wait $! || status=$?
  left=$(docker_objects)
  [[ -z $left ]] || {
    printf 'left in Docker:\n%s\n' "$left"
    remove_docker_objects
    status=1
  }
  ((status == 0)) || tail -c "+$((logged + 1))" /run/dockerd.log | tail -n 30 | cut -c1-600 | sed 's/^/dockerd: /'
  return "$status"
}
