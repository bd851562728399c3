#!/usr/bin/env bash
# How nutshell gets onto a node (deploy/): the script that changes the node, on this machine, with the
# containerd of each version; the DaemonSet's other script; the YAML as far as it can be checked without a
# cluster. systemctl, curl and in most cases the executable are played by scripts.
source "$(dirname "$0")/../lab/test.bash"
source "$(dirname "$0")/../cases/deploy.bash"

: >/run/containerd.log
# Whatever this machine's packages have put there.
mount -t tmpfs tmpfs /usr/local/bin
[[ ! -d /etc/containerd ]] || rm -r /etc/containerd
mkdir /etc/containerd
deploy_files
resident awk cmp cp diff find flock grep install mktemp mv nsenter readlink rm sed sha256sum sort sync tail touch

for version in 1.7 2.1; do
  use_containerd "$version"
  for start in default nothing version_only own_settings other_version; do
    check "$version: installed and uninstalled on a configuration: $start" \
      installed_once_and_uninstalled_without_a_trace "$start"
  done
  check "$version: containerd starts and has the handler" containerd_starts_and_has_the_handler
  check "$version: what is changed meanwhile survives the uninstall" what_is_changed_meanwhile_survives
  check "$version: configuration that cannot be understood is named and not changed" configurations_that_are_refused
done

check "imports that are there stay" imports_that_are_there_stay
check "imported settings of 1.7 are not lost" imported_settings_of_1_7_are_not_lost
check "unknown containerd is named" unknown_containerd_is_named
check "containerd of another kind is named" containerd_of_another_kind_is_named
check "node without KVM is not changed" node_without_kvm_is_not_changed
check "containerd that would take its containers along is not restarted" unit_that_kills_is_refused
check "containerd that does not start again gets its configuration back" failed_restart_is_undone
check "restart that was interrupted is made up for" interrupted_restart_is_made_up_for
check "executable is replaced under a running one" executable_is_replaced_under_a_running_one
check "uninstall waits for the machines" uninstall_waits_for_the_machines
check "folder of the executable can be another" folder_of_the_executable_can_be_another
check "node is changed from inside a container" node_is_changed_from_inside_a_container
check "pod labels the node and leaves as it is told" pod_labels_the_node_and_leaves_as_it_is_told
check "pod takes the label off a node that does not work" pod_takes_the_label_off_a_node_that_does_not_work
check "manifests agree with the scripts" manifests_agree_with_the_scripts
check "this executable is installed after it booted a guest" this_executable_is_installed
umount /usr/local/bin
finish
