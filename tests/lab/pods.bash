# A node for pods, inside the lab machine: containerd with its CRI service, and a bridge for the pods. Sourced after
# test.bash.

# start_node VERSION [IMAGE...]
#
# Starts containerd 2.1 or 1.7 with its CRI service and the runtime handlers `runc` and `nutshell`; 2.1 also with
# `nutshell-sandbox-service` (sandboxes through the Sandbox service), `nutshell-disk` (a disk for each container) and
# `nutshell-routed` (pods with an address of lab/routed-network). The network of the others is the bridge `pods` with
# 10.88.0.0/16 and fd00:88::/64; the host has the first address of each.
start_node() {
  local version=$1 program runtime programs
  shift
  for program in bridge host-local portmap loopback; do cp "/usr/lib/cni/$program" /run/bin/; done
  copy_to_memory bridge iptables ip6tables modprobe

  # CNI plugins create these and never remove them. They exist beforehand, so that they do not count as left behind.
  mkdir -p /run/cni/net.d /run/cni/addresses/pods /run/netns
  touch /run/cni/addresses/pods/lock /run/xtables.lock
  echo 10.88.0.1 >/run/cni/addresses/pods/last_reserved_ip.0
  echo fd00:88::1 >/run/cni/addresses/pods/last_reserved_ip.1
  cat >/run/cni/net.d/pods.conflist <<'NETWORK'
{
  "cniVersion": "0.4.0",
  "name": "pods",
  "plugins": [
    {
      "type": "bridge",
      "bridge": "pods",
      "isGateway": true,
      "ipMasq": false,
      "hairpinMode": true,
      "ipam": {
        "type": "host-local",
        "dataDir": "/run/cni/addresses",
        "ranges": [[{"subnet": "10.88.0.0/16"}], [{"subnet": "fd00:88::/64"}]],
        "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]
      }
    },
    {"type": "portmap", "snat": true, "capabilities": {"portMappings": true}}
  ]
}
NETWORK
  ip link add pods address 02:00:0a:58:00:01 type bridge
  ip link set pods up
  ip address add 10.88.0.1/16 dev pods
  ip address add fd00:88::1/64 dev pods nodad
  # The host answers ARP requests for the gateway of lab/routed-network if it has a route to it through another link.
  cp "$lab/routed-network" /run/bin/
  mkdir -p /run/cni/routed.d /run/cni/routed
  echo '{"cniVersion": "0.4.0", "name": "routed", "plugins": [{"type": "routed-network"}]}' >/run/cni/routed.d/routed.conflist
  ip route add 169.254.1.1 dev pods scope link
  # As on any distribution: containerd resolves localhost when it forwards ports.
  printf '127.0.0.1 localhost\n::1 localhost\n' >/etc/hosts
  # A kubelet creates the group kubepods and the folder for logs. containerd and runc create the other groups and
  # folders and never remove them.
  mkdir -p /sys/fs/cgroup/kubepods /sys/fs/cgroup/k8s.io /run/pods
  echo "+cpu +cpuset +io +memory +pids +hugetlb" >/sys/fs/cgroup/kubepods/cgroup.subtree_control
  mkdir -p /run/containerd/io.containerd.runtime.v2.task/k8s.io /run/containerd/runc/k8s.io

  case $version in
    1.7)
      CONTAINERD_CONFIG_VERSION=2
      programs='bin_dir = "/run/bin"'
      runtime='plugins."io.containerd.grpc.v1.cri"'
      mkdir -p /run/containerd/io.containerd.grpc.v1.cri/{containers,sandboxes}
      CONTAINERD_CONFIG="[$runtime]
sandbox_image = \"localhost/pause:latest\"
enable_unprivileged_ports = true
enable_unprivileged_icmp = true"
      ;;
    *)
      CONTAINERD_CONFIG_VERSION=3
      programs='bin_dirs = ["/run/bin"]'
      runtime='plugins."io.containerd.cri.v1.runtime"'
      mkdir -p /run/containerd/io.containerd.sandbox.controller.v1.shim/k8s.io
      mkdir -p /run/containerd/io.containerd.grpc.v1.cri/{containers,sandboxes,image-volumes}
      CONTAINERD_CONFIG="[plugins.\"io.containerd.cri.v1.images\".pinned_images]
sandbox = \"localhost/pause:latest\"
[$runtime.containerd.runtimes.nutshell-sandbox-service]
runtime_type = \"io.containerd.nutshell.v2\"
sandboxer = \"shim\"
[$runtime.containerd.runtimes.nutshell-disk]
runtime_type = \"io.containerd.nutshell.v2\"
snapshotter = \"blockfile\"
[$runtime.containerd.runtimes.nutshell-routed]
runtime_type = \"io.containerd.nutshell.v2\"
cni_conf_dir = \"/run/cni/routed.d\"
[plugins.\"io.containerd.snapshotter.v1.blockfile\"]
scratch_file = \"/run/scratch.ext4\"
root_path = \"/run/containerd-root/blockfile\"
fs_type = \"ext4\"
mount_options = []
recreate_scratch = true"
      truncate -s 64M /run/scratch.ext4
      mkfs.ext4 -q /run/scratch.ext4
      ;;
  esac
  CONTAINERD_CONFIG+="
[$runtime.cni]
$programs
conf_dir = \"/run/cni/net.d\"
[$runtime.containerd.runtimes.runc]
runtime_type = \"io.containerd.runc.v2\"
[$runtime.containerd.runtimes.nutshell]
runtime_type = \"io.containerd.nutshell.v2\"
pod_annotations = [\"io.containerd.nutshell.*\"]
container_annotations = [\"io.containerd.nutshell.*\"]"
  cp "$NUTSHELL_TEST_CRI" /run/bin/cri
  export NUTSHELL_TEST_LAB=$lab
  set_up_containerd -c "$version" pause "$@"
  cri node
}

# pod NAME CASE: runs a case of tests/cri with the runtime handler $handler, if CASE contains NUTSHELL_TEST_FILTER.
pod() {
  [[ $2 == *"${NUTSHELL_TEST_FILTER:-}"* ]] || return 0
  # If the previous case killed containerd, the next cases must not fail for that.
  [[ -e /proc/$(</run/containerd.pid) ]] || start_containerd
  check "$handler: $1" cri "$2" "$handler"
}
