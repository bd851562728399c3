# Networks of single containers: what is in the network namespace that they are given. To be sourced
# by tests/suites/*.sh, after tests/cases/containers.bash.

# make_network: namespace "pod" with eth0, a link to the host that has .1 and ::1.
make_network() {
  ip netns add pod
  ip link add host0 type veth peer name eth0 netns pod
  ip addr add 10.77.0.1/24 dev host0
  ip addr add fd77::1/64 dev host0 nodad
  ip link set host0 up
  ip -n pod link set lo up
  ip -n pod link set eth0 up
  ip -n pod addr add 10.77.0.5/24 dev eth0
  ip -n pod addr add fd77::5/64 dev eth0 nodad
  ip -n pod route add default via 10.77.0.1
}

# At once: nothing may hold it.
remove_network() {
  ip -n pod link del eth0
  ip netns del pod
}

container_has_the_network_of_its_namespace() {
  make_network
  new_name
  local inside
  inside=$(nutshell "$name" --rm --with-ns network:/run/netns/pod -- sh -c \
    'ip -o addr show eth0; ip route; ip -6 route; ping -c 1 -W 5 10.77.0.1; ping -c 1 -W 5 fd77::1')
  assert_contains "$inside" "10.77.0.5/24"
  assert_contains "$inside" "fd77::5/64"
  assert_contains "$inside" "default via 10.77.0.1 dev eth0"
  assert_equal 2 "$(grep -c "1 packets received" <<<"$inside")"
  remove_network
}

network_cases() {
  # The mounts that the first namespace brings along stay.
  ip netns add first
  ip netns del first
  check "container has the network of its namespace" container_has_the_network_of_its_namespace
}
