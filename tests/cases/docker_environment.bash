# Volumes, health, restarts and settings of Docker's containers. Sourced by tests/suites/docker.sh, after
# tests/cases/docker_network.bash.

namespaces_of_the_host_and_of_other_containers_are_refused_with_their_name() {
  start_container one --ipc shareable
  ! docker_run --rm --name two --network container:one busybox true 2>/run/tmp/err || return 1
  cat /run/tmp/err
  assert_contains "$(</run/tmp/err)" "belongs to another virtual machine"
  docker exec one ping -q -c 1 -W 5 "$(inspect one '{{.NetworkSettings.Gateway}}')" >/dev/null
  local option
  for option in --network=host --pid=host --ipc=host --pid=container:one --ipc=container:one; do
    ! docker_run --rm --name two "$option" busybox true 2>/run/tmp/err || { echo "$option was accepted" && return 1; }
    cat /run/tmp/err
    assert_contains "$(</run/tmp/err)" "namespace"
    [[ -z $(docker ps --all --quiet --filter name=two) ]] || remove two
  done
  rm /run/tmp/err
  remove one
}

volumes_keep_and_share_files() {
  docker volume create data >/dev/null
  docker_run --rm --volume data:/data busybox sh -c 'echo kept >/data/file'
  assert_equal kept "$(docker_run --rm --volume data:/data busybox cat /data/file)"
  # A new volume gets what the image has at this place.
  assert_contains "$(docker_run --rm --volume fresh:/etc busybox cat /etc/passwd)" "root:x:0:0"
  mkdir /run/tmp/folder
  echo host >/run/tmp/folder/file
  assert_equal "host" "$(docker_run --rm --volume /run/tmp/folder:/data busybox sh -c 'cat /data/file; echo guest >/data/new')"
  assert_equal guest "$(</run/tmp/folder/new)"
  assert_contains "$(docker_run --rm --volume /run/tmp/folder:/data:ro busybox sh -c 'cat /data/new; echo no >/data/new' 2>&1 || true)" \
    "Read-only file system"
  assert_equal guest "$(</run/tmp/folder/new)"
  assert_equal host "$(docker_run --rm --volume /run/tmp/folder/file:/etc/file:ro busybox cat /etc/file)"
  # Two containers see each other's changes.
  start_container one --volume data:/data
  docker_run --rm --volumes-from one busybox sh -c 'echo changed >/data/file'
  wait_until changed docker exec one cat /data/file
  remove one
  docker volume rm data fresh >/dev/null
  rm -r /run/tmp/folder
}

tmpfs_has_its_size_and_options() {
  assert_equal "tmpfs 1048576 700 7" "$(docker_run --rm --tmpfs /t:size=1m,mode=700,uid=7 busybox \
    sh -c 'echo $(stat -f -c %T /t) $(($(stat -f -c "%b * %S" /t))) $(stat -c "%a %u" /t)')"
  assert_contains "$(docker_run --rm --mount type=tmpfs,dst=/t,tmpfs-size=64k busybox dd if=/dev/zero of=/t/file bs=1k count=1k 2>&1 || true)" \
    "No space left on device"
  assert_equal 16777216 "$(docker_run --rm --shm-size 16m busybox sh -c 'echo $(($(stat -f -c "%b * %S" /dev/shm)))')"
}

socket_as_a_volume_is_refused_with_its_path() {
  ! docker_run --rm --volume /run/docker.sock:/run/docker.sock busybox true 2>/run/tmp/err || return 1
  cat /run/tmp/err
  assert_contains "$(</run/tmp/err)" "/run/docker.sock"
  assert_contains "$(</run/tmp/err)" "socket"
  rm /run/tmp/err
}

health_status_follows_the_health_command() {
  start_container one --health-cmd 'test -e /ok' --health-interval 1s --health-timeout 20s --health-retries 2
  wait_until unhealthy inspect one '{{.State.Health.Status}}'
  docker exec one touch /ok
  wait_until healthy inspect one '{{.State.Health.Status}}'
  assert_equal 0 "$(inspect one '{{.State.Health.FailingStreak}}')"
  remove one
}

restart_policies_are_applied() {
  start_container failing --restart on-failure:2 -- sh -c 'echo run; exit 3'
  start_container always --restart always
  start_container unless --restart unless-stopped -- sh -c 'sleep 1000; true'
  wait_until "exited 2 3" inspect failing '{{.State.Status}} {{.RestartCount}} {{.State.ExitCode}}'
  assert_equal "run run run" "$(echo $(docker logs failing))"
  # `docker kill` counts as a stop by the user.
  kill -KILL "$(inspect always '{{.State.Pid}}')"
  wait_until "running 1" inspect always '{{.State.Status}} {{.RestartCount}}'
  kill -KILL "$(inspect unless '{{.State.Pid}}')"
  wait_until "running 1" inspect unless '{{.State.Status}} {{.RestartCount}}'
  docker exec always true
  docker exec unless true
  docker stop --time 0 unless always >/dev/null
  assert_equal "exited exited" "$(echo $(inspect unless '{{.State.Status}}') $(inspect always '{{.State.Status}}'))"
  remove failing always unless
}

web_and_database_work_together() {
  docker network create app >/dev/null
  docker volume create rows >/dev/null
  start_container db --network app --network-alias database --volume rows:/rows --health-cmd 'nc -w 1 127.0.0.1 5432 </dev/null' \
    --health-interval 1s --health-timeout 20s -- sh -c 'echo row >/rows/1; exec nc -ll -p 5432 -e cat /rows/1'
  wait_until healthy inspect db '{{.State.Health.Status}}'
  start_container web --network app --publish 127.0.0.1:8080:80 --restart on-failure -- sh -c \
    'mkdir -p /www && nc -w 10 database 5432 </dev/null >/www/index.html && exec httpd -f -p 80 -h /www'
  assert_equal row "$(fetch 8080)"
  remove web db
  docker network rm app >/dev/null
  docker volume rm rows >/dev/null
}

settings_reach_the_process() {
  local output
  output=$(docker_run --rm --hostname named --add-host example:10.1.2.3 --dns 10.9.8.7 --dns-search example.org \
    --user 1234:5678 --group-add 42 --cap-drop all --ulimit nofile=1234:2345 --sysctl net.ipv4.ip_local_port_range="2000 3000" \
    --sysctl kernel.msgmax=1000 --oom-score-adj 500 --pids-limit 77 --security-opt no-new-privileges --workdir /var \
    --env A=b --label l=m --read-only --tmpfs /tmp busybox sh -c '
      echo $(hostname) $(id -u) $(id -g) $(id -G) $(pwd) $A
      grep -E "example|named" /etc/hosts; cat /etc/resolv.conf
      grep -E "CapEff|CapBnd|NoNewPrivs|Seccomp:" /proc/self/status
      ulimit -n; ulimit -Hn; cat /proc/sys/net/ipv4/ip_local_port_range /proc/sys/kernel/msgmax /proc/self/oom_score_adj
      cat /sys/fs/cgroup/pids.max
      touch /file 2>&1; touch /tmp/file && echo written')
  echo "$output"
  local expected
  for expected in "named 1234 5678 5678 42 /var b" "10.1.2.3"$'\t'"example" "nameserver 10.9.8.7" "search example.org" \
    $'CapBnd:\t0000000000000000' $'CapEff:\t0000000000000000' $'NoNewPrivs:\t1' $'Seccomp:\t2' $'\n1234\n2345\n' \
    $'2000\t3000\n1000\n500\n77' "/file: Read-only file system" written; do
    assert_contains "$output" "$expected"
  done
}

init_forwards_signals_and_reaps() {
  start_container one --init -- sh -c 'sleep 0 & exec sleep 1000'
  assert_contains "$(docker exec one cat /proc/1/cmdline | tr '\0' ' ')" "docker-init -- sh -c"
  # sleep as the first process would ignore TERM.
  docker stop --time 30 one >/dev/null
  assert_equal 143 "$(inspect one '{{.State.ExitCode}}')"
  remove one
}

privileged_container_has_all_capabilities() {
  local output
  output=$(docker_run --rm --privileged busybox sh -c \
    'grep CapEff /proc/self/status; mkdir /m && mount -t tmpfs tmpfs /m && echo mounted; ls /dev')
  echo "$output"
  assert_contains "$output" $'CapEff:\t000001ffffffffff'
  assert_contains "$output" mounted
  # A device of the guest that only such a container has.
  assert_contains "$output" loop-control
  # Without it, mounting is not permitted.
  assert_contains "$(docker_run --rm busybox sh -c 'mkdir /m; mount -t tmpfs tmpfs /m' 2>&1 || true)" "ermission denied"
}

devices_are_those_of_the_guest() {
  assert_equal "character special file" "$(docker_run --rm --device /dev/net/tun busybox stat -c %F /dev/net/tun)"
  ! docker_run --rm --device /dev/mem busybox true 2>/run/tmp/err || return 1
  cat /run/tmp/err
  assert_contains "$(</run/tmp/err)" /dev/mem
  rm /run/tmp/err
}

containers_survive_a_restart_of_the_daemon() {
  start_container one -- sh -c 'while [ ! -e /go ]; do sleep 0.1; done; echo last; exit 6'
  start_container two
  start_container three --publish 127.0.0.1:8080:80 -- sh -c "$(serve restored)"
  local signal pid
  pid=$(inspect two '{{.State.Pid}}')
  for signal in TERM KILL; do
    stop_docker "$signal"
    start_docker
    assert_equal "running $pid" "$(inspect two '{{.State.Status}} {{.State.Pid}}')"
    assert_equal inside "$(docker exec two echo inside)"
    assert_equal restored "$(fetch 8080)"
  done
  docker exec one touch /go
  assert_equal 6 "$(docker wait one)"
  assert_equal last "$(docker logs one)"
  # This one exits while the daemon is down.
  stop_docker KILL
  kill -KILL "$pid"
  start_docker
  wait_until "exited 137" inspect two '{{.State.Status}} {{.State.ExitCode}}'
  remove one two three
}

running_container_is_removed_by_force() {
  start_container one
  docker exec --detach one sleep 1000
  docker rm --force one >/dev/null
  assert_contains "$(docker inspect one 2>&1 || true)" "No such object"
  start_container one
  docker pause one >/dev/null
  docker rm --force one >/dev/null
}

ten_containers_run_in_parallel() {
  local number clients=() failed=0
  for number in {1..10}; do
    docker_run --rm --memory 64m busybox sh -c "echo $number; exit $number" >"/run/tmp/out.$number" 2>&1 &
    clients+=($!)
  done
  for number in {1..10}; do
    assert_status "$number" wait "${clients[number - 1]}" || failed=1
    assert_equal "$number" "$(<"/run/tmp/out.$number")" || failed=1
    rm "/run/tmp/out.$number"
  done
  return "$failed"
}

docker_environment_cases() {
  docker_check "namespaces of the host and of other containers are refused with their name" namespaces_of_the_host_and_of_other_containers_are_refused_with_their_name
  docker_check "volumes keep and share files" volumes_keep_and_share_files
  docker_check "tmpfs has its size and options" tmpfs_has_its_size_and_options
  docker_check "socket as a volume is refused with its path" socket_as_a_volume_is_refused_with_its_path
  docker_check "health status follows the health command" health_status_follows_the_health_command
  docker_check "restart policies are applied" restart_policies_are_applied
  docker_check "web and database work together" web_and_database_work_together
  docker_check "settings reach the process" settings_reach_the_process
  docker_check "init forwards signals and reaps" init_forwards_signals_and_reaps
  docker_check "privileged container has all capabilities" privileged_container_has_all_capabilities
  docker_check "devices are those of the guest" devices_are_those_of_the_guest
  docker_check "containers survive a restart of the daemon" containers_survive_a_restart_of_the_daemon
  docker_check "running container is removed by force" running_container_is_removed_by_force
  docker_check "ten containers run in parallel" ten_containers_run_in_parallel
}
