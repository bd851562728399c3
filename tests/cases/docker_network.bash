# Networks of the Docker Engine. Sourced by tests/suites/docker.sh, after tests/cases/docker.bash.

# fetch PORT: prints what http://127.0.0.1:PORT/ has, and retries until the server answers.
fetch() {
  local try
  for try in {1..100}; do
    ! timeout 5 busybox wget -q -O - "http://127.0.0.1:$1/" 2>/dev/null || return 0
    read -r -t 0.1 -u "$never" || true
  done
  echo "no answer on port $1" >&2
  return 1
}

# download ADDRESS: prints a command that prints what http://ADDRESS/ has. (The option -T of this wget crashes it.)
download() { echo "for try in 1 2 3 4 5 6 7 8 9 10; do timeout 10 wget -q -O - http://$1/ && exit; sleep 0.5; done; exit 1"; }

# serve TEXT: prints a command that serves TEXT as /index.html on port 80.
serve() { echo "mkdir /www && echo $1 >/www/index.html && exec httpd -f -p 80 -h /www"; }

published_port_reaches_the_container() {
  start_container one --publish 127.0.0.1:8080:80 -- sh -c "$(serve published)"
  assert_equal published "$(fetch 8080)"
  assert_equal "127.0.0.1:8080" "$(docker port one 80)"
  remove one
  ! { exec {connection}<>/dev/tcp/127.0.0.1/8080; } 2>/dev/null || return 1
}

container_reaches_the_host_and_is_reached_by_address() {
  start_container one -- sh -c "$(serve direct)"
  local address gateway
  address=$(inspect one '{{.NetworkSettings.IPAddress}}')
  gateway=$(inspect one '{{.NetworkSettings.Gateway}}')
  docker exec one ping -q -c 1 -W 5 "$gateway" >/dev/null
  assert_equal direct "$(docker_run --rm busybox sh -c "$(download "$address")")"
  remove one
}

containers_of_a_network_reach_each_other() {
  docker network create --subnet 10.99.0.0/24 net >/dev/null
  start_container server --network net --ip 10.99.0.10 -- sh -c "$(serve network)"
  assert_equal network "$(docker_run --rm --network net busybox sh -c "$(download 10.99.0.10)")"
  # Another network does not reach it: its packets are dropped.
  assert_status 143 docker_run --rm busybox sh -c 'timeout 2 wget -q -O - http://10.99.0.10/; exit $?'
  remove server
  docker network rm net >/dev/null
}

names_of_a_network_resolve() {
  docker network create net >/dev/null
  start_container server --network net --network-alias other -- sh -c "$(serve named)"
  start_container client --network net --link server:linked
  local name
  for name in server other linked; do assert_equal named "$(docker exec client sh -c "$(download "$name")")"; done
  # A container that joins later.
  start_container late --network net
  docker exec client ping -q -c 1 -W 5 late >/dev/null
  remove server client late
  docker network rm net >/dev/null
}

ipv6_works_in_a_network_that_has_it() {
  docker network create --ipv6 --subnet fd99::/64 net >/dev/null
  start_container one --network net --ip6 fd99::10
  docker_run --rm --network net busybox ping -q -c 1 -W 10 fd99::10 >/dev/null
  start_container two
  docker network connect --ip6 fd99::20 net two
  wait_until 1 docker exec two sh -c 'ip addr | grep -c fd99::20/64'
  docker exec two ping -q -c 1 -W 10 fd99::10 >/dev/null
  remove one two
  docker network rm net >/dev/null
}

network_is_connected_and_disconnected() {
  docker network create --subnet 10.99.0.0/24 net >/dev/null
  start_container one
  docker network connect --ip 10.99.0.20 net one
  wait_until 1 docker exec one sh -c 'ip addr | grep -c 10.99.0.20/24'
  docker exec one ping -q -c 1 -W 5 10.99.0.1 >/dev/null
  docker network disconnect net one
  remove one
  docker network rm net >/dev/null
}

no_network_leaves_the_loopback() {
  assert_equal /sys/class/net/lo/ "$(docker_run --rm --network none busybox sh -c 'ls -d /sys/class/net/*/')"
}

docker_network_cases() {
  docker_check "published port reaches the container" published_port_reaches_the_container
  docker_check "container reaches the host and is reached by its address" container_reaches_the_host_and_is_reached_by_address
  docker_check "containers of a network reach each other" containers_of_a_network_reach_each_other
  docker_check "names of a network resolve" names_of_a_network_resolve
  docker_check "IPv6 works in a network that has it" ipv6_works_in_a_network_that_has_it
  docker_check "network is connected and disconnected" network_is_connected_and_disconnected
  docker_check "no network leaves the loopback" no_network_leaves_the_loopback
}
