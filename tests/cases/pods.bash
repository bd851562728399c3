# Pods as a kubelet has them: what a pod's containers share, what they are spared, and how they are reached. To be
# sourced after lab/pods.bash. The cases are in tests/cri/src/cases.

pod_cases() {
  pod "pod of one container runs it to its end" pods::pod_of_one
  pod "init containers run one after the other, then the others together" pods::init_containers
  pod "five containers of a pod go in any order" pods::pod_of_five
  pod "container is started again under its name" pods::restart
  pod "pod without a running container is ready until it is stopped" pods::pod_without_a_running_container
  pod "ephemeral container joins the processes of another" pods::ephemeral_container
  pod "pods survive a killed containerd" pods::restarted_containerd
  pod "containers share network, names, memory and queues, and not processes" namespaces::processes_apart
  pod "containers share processes where the pod says so" namespaces::processes_together
  pod "files and settings of the pod are in its containers" namespaces::files_and_settings
  [[ $handler == runc ]] ||
    pod "host's namespaces are refused by name" namespaces::host_namespaces_are_refused
  pod "crash, kill, hunger and a missing program are one container's own" failures::end_of_one_leaves_the_others
  pod "pod without overhead loses a process and not its machine" failures::pod_without_overhead_runs_out_of_memory
  pod "stop asks before it kills" failures::stop_is_graceful_first
  pod "executed commands report streams, status and a missed deadline" streams::executed_commands
  pod "a probe each second leaves the shim as it is" streams::probes
  pod "logs are complete, also while they are rotated" streams::logs
  pod "terminals and attached streams are a client's" streams::terminals
  pod "forwarded ports carry 10 MiB both ways, IPv4 and IPv6" forward::forwarded_ports
  pod "fifty forwarded connections at once" forward::fifty_at_once
  pod "pods reach each other and the host by TCP, UDP and ICMP" network::pods_reach_each_other_and_the_host
  pod "names are resolved as the pod says" network::names_are_resolved
  pod "ports of the host lead to the pod" network::host_ports
  pod "statistics are what was used" resources::statistics
  [[ $handler == runc ]] ||
    pod "machine is in the pod's group, as cgroupfs and as systemd name it" resources::group_of_both_drivers
  pod "limits change while a container runs" resources::updated_limits
  pod "machine of a pod grows and shrinks with the limits of its containers" resources::resize_up
  [[ $handler == runc ]] ||
    pod "memory that comes while files are written and read is used without harm" resources::growth_under_load
}

# Where each container has a disk.
disk_cases() {
  pod "disks of containers come and go" disks::come_and_go
  pod "memory that comes while files are written and read is used without harm" resources::growth_under_load
}
