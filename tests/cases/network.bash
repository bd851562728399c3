# Network of single containers: they have the links, addresses and routes of their network namespace on the host.
# Sourced by tests/suites/*.sh, after tests/cases/containers.bash.

# make_network: creates the network namespace "pod" with eth0, whose peer host0 has the addresses .1 and ::1.
make_network() {
  # Left by a case that failed.
  local link
  for link in host0 host1 host2 host3 parent base0; do ip link del "$link" 2>/dev/null || true; done
  ip netns del pod 2>/dev/null || true
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

# remove_network: deletes the namespace and asserts that no process holds it. The kernel removes host0 with the last
# reference to the namespace.
remove_network() {
  ip netns del pod
  local try
  for try in {1..50}; do
    [[ -e /sys/class/net/host0 ]] || return 0
    read -r -t 0.1 -u "$never" || true
  done
  echo "a process holds the network namespace" >&2
  return 1
}

container_has_the_addresses_and_routes_of_its_namespace() {
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

each_thread_has_its_list_of_system_calls() {
  make_network
  new_name
  mkdir /run/tmp/volume
  in_pod "$name" -d --mount type=bind,src=/run/tmp/volume,dst=/volume,options=rbind:rw -- \
    sh -c 'echo >/volume/file && sync && ping -c 1 -W 5 10.77.0.1 && touch /volume/done; sleep 1000'
  local try
  for try in {1..100}; do
    [[ ! -e /run/tmp/volume/done ]] || break
    read -r -t 0.1 -u "$never" || true
  done
  [[ -e /run/tmp/volume/done ]]
  # A flush may still run: its thread ends with it.
  assert_system_call_lists vmm/nutshell-vmm "vmm/vcpu 0" vmm/net fs/nutshell-fs fs/vring_worker holder/nutshell-holder
  ctr task kill --signal SIGKILL "$name"
  wait_for_task "$name" STOPPED
  remove "$name"
  rm -r /run/tmp/volume
  remove_network
}

# in_pod NAME [CTR-OPTION...] -- COMMAND...: runs a container in the network namespace.
in_pod() {
  local name=$1
  shift
  nutshell "$name" --with-ns network:/run/netns/pod "$@"
}

# dial PORT: connects descriptor $connection to the container, and retries until the container listens.
dial() {
  local try
  for try in {1..100}; do
    ! { exec {connection}<>"/dev/tcp/10.77.0.5/$1"; } 2>/dev/null || return 0
    read -r -t 0.1 -u "$never" || true
  done
  echo "the container does not listen on port $1" >&2
  return 1
}

data_arrives_unchanged_in_both_directions() {
  make_network
  new_name
  in_pod "$name" -d --cpus 2 -- sleep 1000
  head -c 20M /dev/urandom >/run/tmp/sent
  local sum received
  sum=$(md5sum </run/tmp/sent)
  ctr task exec --exec-id in "$name" sh -c 'nc -l -p 7000 | md5sum' >/run/tmp/received &
  received=$!
  dial 7000
  cat /run/tmp/sent >&"$connection"
  exec {connection}>&-
  wait "$received"
  assert_equal "$sum" "$(</run/tmp/received)"
  ctr task exec --exec-id out "$name" sh -c 'nc -l -p 7001' </run/tmp/sent &
  received=$!
  dial 7001
  assert_equal "$sum" "$(head -c 20M <&"$connection" | md5sum)"
  exec {connection}>&-
  wait "$received"
  # Packets larger than a frame, and one with the largest size that needs no fragments.
  assert_contains "$(ctr task exec --exec-id large "$name" ping -c 1 -s 60000 -W 5 10.77.0.1)" "1 packets received"
  ping -q -c 1 -W 5 -M do -s 1472 10.77.0.5 >/dev/null
  ping -q -c 1 -W 5 -s 60000 fd77::5 >/dev/null
  # One queue for each vCPU.
  assert_equal "rx-0 rx-1 tx-0 tx-1" "$(echo $(ctr task exec --exec-id queues "$name" ls /sys/class/net/eth0/queues))"
  remove "$name"
  rm /run/tmp/{sent,received}
  remove_network
}

every_link_appears_under_its_name() {
  make_network
  ip link add host1 type veth peer name net1 netns pod
  ip link set host1 mtu 9000 address 02:00:00:00:00:01 up
  ip addr add 10.78.0.1/24 dev host1
  ip -n pod link set net1 mtu 9000 address 02:00:00:00:00:02 up
  ip -n pod addr add 10.78.0.5/24 dev net1
  # Two macvlan links of one parent reach each other. The guest's kernel also assigns the name eth1.
  ip link add parent type dummy
  ip link set parent up
  ip link add host2 link parent type macvlan mode bridge
  ip addr add 10.79.0.1/24 dev host2
  ip link set host2 up
  ip link add eth1 netns pod link parent type macvlan mode bridge
  ip -n pod link set eth1 up
  ip -n pod addr add 10.79.0.5/24 dev eth1
  ip -n pod link add down type veth peer name other
  ip -n pod neigh add 10.78.0.9 lladdr 02:00:00:00:00:09 dev net1 nud permanent
  local mac inside
  mac=$(ip netns exec pod cat /sys/class/net/eth1/address)
  new_name
  inside=$(in_pod "$name" --rm -- sh -c 'for i in /sys/class/net/*; do echo ${i##*/} $(cat $i/address $i/mtu); done
    ip neigh; ping -c 1 -W 5 -s 8000 10.78.0.1; ping -c 1 -W 5 10.79.0.1' || true)
  assert_contains "$inside" "net1 02:00:00:00:00:02 9000"
  assert_contains "$inside" "eth1 $mac 1500"
  assert_contains "$inside" "10.78.0.9 dev net1 lladdr 02:00:00:00:00:09"
  assert_equal 2 "$(grep -c "1 packets received" <<<"$inside")"
  assert_equal "" "$(grep "^down" <<<"$inside" || true)"
  remove_network
  ip link del host2
  ip link del parent
}

ipvlan_and_tap_links_work_like_veth() {
  make_network
  # ipvlan links share the MAC address of their parent; the kernel distinguishes them by IP address.
  ip link add base0 type dummy
  ip link set base0 up
  ip link add host3 link base0 type ipvlan mode l2
  ip addr add 10.80.0.1/24 dev host3
  ip link set host3 up
  ip link add ipv1 netns pod link base0 type ipvlan mode l2
  ip -n pod link set ipv1 up
  ip -n pod addr add 10.80.0.5/24 dev ipv1
  ip -n pod tuntap add tap1 mode tap
  ip -n pod link set tap1 address 02:00:00:00:00:03 up
  ip -n pod addr add 10.81.0.5/24 dev tap1
  local inside
  new_name
  inside=$(in_pod "$name" --rm -- sh -c 'for i in /sys/class/net/*; do echo ${i##*/} $(cat $i/address $i/mtu); done
    ip addr; ping -c 1 -W 5 10.80.0.1' || true)
  assert_contains "$inside" "ipv1 $(</sys/class/net/base0/address) 1500"
  assert_contains "$inside" "tap1 02:00:00:00:00:03 1500"
  assert_contains "$inside" "10.81.0.5/24"
  assert_contains "$inside" "1 packets received"
  remove_network
  ip link del host3
  ip link del base0
}

link_added_to_a_running_container_appears_in_it() {
  make_network
  new_name
  in_pod "$name" -d -- sleep 1000
  ip link add host1 type veth peer name net1 netns pod
  ip addr add 10.78.0.1/24 dev host1
  ip link set host1 up
  ip -n pod link set net1 up
  ip -n pod addr add 10.78.0.5/24 dev net1
  ip -n pod route add 10.79.0.0/16 via 10.78.0.1
  local try seen
  for try in {1..50}; do
    seen=$(ctr task exec --exec-id "look$try" "$name" ip route)
    [[ $seen != *10.79.0.0/16* ]] || break
  done
  assert_contains "$seen" "10.79.0.0/16 via 10.78.0.1 dev net1"
  ping -q -c 1 -W 5 10.78.0.5 >/dev/null
  remove "$name"
  remove_network
}

namespace_is_restored_and_can_be_reused() {
  make_network
  local before try
  # The kernel reports the carrier up to a second later.
  for try in {1..50}; do
    [[ $(ip -n pod link show eth0) != *"state UP"* ]] || break
    read -r -t 0.1 -u "$never" || true
  done
  before=$(tc -n pod qdisc; ip -n pod -o link)
  for try in 1 2; do
    new_name
    assert_contains "$(in_pod "$name" --rm -- ping -c 1 -W 5 10.77.0.1)" "1 packets received"
    assert_equal "$before" "$(tc -n pod qdisc; ip -n pod -o link)"
  done
  # A killed shim leaves its tc redirection, which the next shim replaces.
  new_name
  in_pod "$name" -d -- sleep 1000
  kill -9 $(pids_of shim)
  remove "$name"
  # ctr leaves its fifos if the shim was killed.
  rm -rf /run/containerd/fifo/*
  new_name
  assert_contains "$(in_pod "$name" --rm -- ping -c 1 -W 5 10.77.0.1)" "1 packets received"
  remove_network
}

# Network policies and CNI's bandwidth plugin work at the host's end.
firewall_rules_and_rate_limits_at_the_hosts_end_apply() {
  make_network
  new_name
  in_pod "$name" -d -- sleep 1000
  iptables -I INPUT -i host0 -p icmp --icmp-type echo-request -j DROP
  assert_contains "$(ctr task exec --exec-id dropped "$name" ping -c 1 -W 2 10.77.0.1 || true)" "100% packet loss"
  ctr task exec --exec-id other "$name" ping -q -c 1 -W 5 fd77::1 >/dev/null
  iptables -D INPUT -i host0 -p icmp --icmp-type echo-request -j DROP
  ctr task exec --exec-id let "$name" ping -q -c 1 -W 5 10.77.0.1 >/dev/null

  # 16 Mbit at 4 Mbit/s take 4 s, minus the initial content of the token bucket.
  tc qdisc add dev host0 root tbf rate 4mbit burst 64k latency 400ms
  local start receiver
  ctr task exec --exec-id slow "$name" sh -c 'nc -l -p 7000 | wc -c' >/run/tmp/received &
  receiver=$!
  dial 7000
  start=${EPOCHREALTIME/./}
  head -c 2M /dev/zero >&"$connection"
  exec {connection}>&-
  wait "$receiver"
  assert_equal $((2 << 20)) "$(</run/tmp/received)"
  ((${EPOCHREALTIME/./} - start > 3500000)) || { echo "the transfer was faster than the rate limit" >&2 && return 1; }
  remove "$name"
  rm /run/tmp/received
  remove_network
}

more_links_than_a_machine_can_have_are_an_error() {
  make_network
  local number
  for number in 1 2 3 4; do ip -n pod link add "net$number" type veth peer name "other$number"; ip -n pod link set "net$number" up; done
  new_name
  assert_contains "$(in_pod "$name" --rm -- true 2>&1 || true)" "has 5 links that are up, and a virtual machine can have 4"
  remove_network
}

second_machine_in_a_namespace_is_refused_and_the_first_not_disturbed() {
  make_network
  new_name
  local first=$name
  in_pod "$first" -d -- sleep 1000
  ping -c 1 -W 10 10.77.0.5 >/dev/null
  new_name
  assert_contains "$(in_pod "$name" --rm -- true 2>&1 || true)" "belongs to another virtual machine"
  ping -c 1 -W 10 10.77.0.5 >/dev/null
  remove "$first"
  # The namespace is free again.
  new_name
  in_pod "$name" --rm -- ping -c 1 -W 10 10.77.0.1 >/dev/null
  remove_network
}

# As Docker does: off for all links, then on for some.
ipv6_is_on_for_the_links_that_have_it_in_the_namespace() {
  make_network
  ip link add host1 type veth peer name eth1 netns pod
  ip -n pod link set eth1 up
  ip netns exec pod sh -c 'cd /proc/sys/net/ipv6/conf && echo 1 >all/disable_ipv6 && echo 0 >eth0/disable_ipv6'
  ip -n pod addr add fd77::5/64 dev eth0 nodad
  local inside
  new_name
  inside=$(in_pod "$name" --rm -- sh -c 'ping -q -c 1 -W 5 10.77.0.1; ping -q -c 1 -W 5 fd77::1; ip -6 -o addr
    cd /proc/sys/net/ipv6/conf && echo $(cat all/disable_ipv6 lo/disable_ipv6 eth0/disable_ipv6 eth1/disable_ipv6)')
  assert_equal 2 "$(grep -c "1 packets received" <<<"$inside")"
  assert_equal "1 1 0 1" "$(tail -n 1 <<<"$inside")"
  assert_equal "" "$(grep -E "inet6.* (lo|eth1) " <<<"$inside" || true)"
  remove_network
}

# The parameters also hold for a link that is added later. The local ports begin below the default start of the
# unprivileged ports: the kernel compares the two.
parameters_of_the_namespace_hold_in_the_container() {
  make_network
  local values name value inside
  values=$(printf '%b\n' core/somaxconn=77 ipv4/ip_unprivileged_port_start=500 'ipv4/ip_local_port_range=600\t700' \
    ipv4/ip_local_reserved_ports=650-660 ipv4/ip_nonlocal_bind=1 'ipv4/ping_group_range=0\t9' ipv4/tcp_fin_timeout=7 \
    ipv4/tcp_keepalive_intvl=8 ipv4/tcp_keepalive_probes=5 ipv4/tcp_keepalive_time=66 ipv4/tcp_syncookies=2 \
    ipv6/ip_nonlocal_bind=1 ipv4/conf/{eth0,default}/{accept_local=1,arp_announce=2,arp_ignore=3,proxy_arp=1} \
    ipv4/conf/{eth0,default}/{route_localnet=1,rp_filter=2})
  while IFS='=' read -r name value; do
    ip netns exec pod sh -c "echo '$value' >/proc/sys/net/$name"
  done <<<"$values"
  new_name
  in_pod "$name" -d -- sleep 1000
  ip link add host1 type veth peer name eth1 netns pod
  ip netns exec pod sh -c 'echo 1 >/proc/sys/net/ipv4/conf/eth1/rp_filter'
  ip -n pod link set eth1 up
  ip -n pod addr add 10.78.0.5/24 dev eth1
  ctr task exec --exec-id wait "$name" timeout 10 sh -c 'until ip addr show eth1 | grep -q 10.78.0.5; do usleep 10000; done'
  inside=$(ctr task exec --exec-id values "$name" sh -c 'cd /proc/sys/net && for name in "$@"; do echo "$name=$(cat $name)"; done' values \
    $(cut -d= -f1 <<<"$values") ipv4/conf/eth1/{rp_filter,arp_ignore})
  assert_equal "$values"$'\nipv4/conf/eth1/rp_filter=1\nipv4/conf/eth1/arp_ignore=3' "$inside"
  remove "$name"
  remove_network
}

network_cases() {
  # The first namespace creates mounts that stay: they must exist before the first check.
  ip netns add first
  ip netns del first
  check "container has the addresses and routes of its network namespace" container_has_the_addresses_and_routes_of_its_namespace
  check "each thread has its list of system calls" each_thread_has_its_list_of_system_calls
  check "data arrives unchanged in both directions" data_arrives_unchanged_in_both_directions
  check "every link of the namespace appears under its name" every_link_appears_under_its_name
  check "ipvlan and tap links work like veth" ipvlan_and_tap_links_work_like_veth
  check "link added to a running container appears in it" link_added_to_a_running_container_appears_in_it
  check "network namespace is restored and can be reused" namespace_is_restored_and_can_be_reused
  check "firewall rules and rate limits at the host's end of a link apply" firewall_rules_and_rate_limits_at_the_hosts_end_apply
  check "second machine in a network namespace is refused, and the first not disturbed" \
    second_machine_in_a_namespace_is_refused_and_the_first_not_disturbed
  check "IPv6 is on for the links that have it in the network namespace" \
    ipv6_is_on_for_the_links_that_have_it_in_the_namespace
  check "kernel parameters of the network namespace hold in the container" parameters_of_the_namespace_hold_in_the_container
  check "more links than a machine can have are an error" more_links_than_a_machine_can_have_are_an_error
}
