# Installation on a node. Sourced by tests/deploy and tests/suites/deploy-*.sh.

deploy=$lab/../../deploy
work=/run/check.deploy
config=/etc/containerd/config.toml

# make_node: mounts empty folders over those that this machine's packages have filled.
make_node() {
  mkdir -p /etc/containerd
  mount -t tmpfs -o mode=755 tmpfs /etc/containerd
  mount -t tmpfs -o mode=755 tmpfs /usr/local/bin
  set_up_stubs
}

# Installs the scripts under test and the stubs of systemctl and the executable. $work/unit/NAME is the property NAME of
# containerd's unit.
set_up_stubs() {
  mkdir -p "$work/unit" "$work/node"
  cp "$deploy"/{node,pod,containerd-v2.toml,containerd-v3.toml} "$work/node"
  echo process >"$work/unit/KillMode"
  echo '{ path=/run/bin/containerd ; argv[]=/run/bin/containerd ; ignore_errors=no ; start_time=[n/a] }' \
    >"$work/unit/ExecStart"
  write_stub /run/bin/systemctl "case \$1 in
    show) cat $work/unit/\$3 2>/dev/null || echo ;;
    restart) echo restart >>$work/restarts; [[ ! -e $work/broken ]] ;;
    is-active) true ;;
  esac"
  write_stub "$work/shim" 'case $1 in check) echo "guest kernel stub" ;; -v) echo "$0 0" ;; esac'
  export NUTSHELL_SHIM=$work/shim
}

# write_stub FILE SCRIPT: writes an executable bash script.
write_stub() {
  rm -f "$1"
  printf '#!/bin/bash\n%s\n' "$2" >"$1"
  chmod +x "$1"
}

use_containerd() {
  version=$1
  cp --remove-destination "$("$lab/containerd" "$1")/containerd" /run/bin/containerd
}

node() { "$work/node/node" "$@"; }

# tree: prints all files that an installation may change, with content, mode and owner.
tree() {
  find /etc/containerd /usr/local/bin -printf '%p %y %m %u %g\n' | sort
  find /run /var/cache -maxdepth 1 -name 'nutshell*'
  find /etc/containerd /usr/local/bin -type f -exec sha256sum {} + | sort
}

# times: prints when each file was changed.
times() { find /etc/containerd /usr/local/bin -type f -printf '%p %T@ %C@ %i\n' | sort; }

# restarts: prints how often containerd was restarted.
restarts() { if [[ -e $work/restarts ]]; then wc -l <"$work/restarts"; else echo 0; fi; }

# clear_node: deletes configuration, installed files and the count of restarts.
clear_node() {
  rm -rf /etc/containerd/* /usr/local/bin/* "$work/restarts" "$work/broken" /run/nutshell-restart-due
}

# plugin VERSION: prints the name of the runtime plugin in a configuration of this version.
plugin() { if [[ $1 == 2 ]]; then echo io.containerd.grpc.v1.cri; else echo io.containerd.cri.v1.runtime; fi; }

# own_tables VERSION: prints settings of an administrator.
own_tables() {
  printf '[plugins."%s".containerd.runtimes.runc]\n  runtime_type = "io.containerd.runc.v2"\n' "$(plugin "$1")"
  printf '  [plugins."%s".containerd.runtimes.runc.options]\n    SystemdCgroup = true' "$(plugin "$1")"
}

# configuration KIND: writes containerd's configuration.
configuration() {
  local own=3
  [[ $version != 1.7 ]] || own=2
  case $1 in
    default) containerd config default >$config ;;
    nothing) ;;
    version_only) echo "version = $own" >$config ;;
    # The last line has no newline.
    own_settings) printf 'version = %s\n%s' "$own" "$(own_tables "$own")" >$config ;;
    # An older configuration version than containerd's, if there is one; readable only by root.
    other_version)
      printf '# mine\nversion = 2\nimports = [ ]   # none\n\n%s\n' "$(own_tables 2)" >$config
      chmod 600 $config
      ;;
  esac
}

# dump: prints containerd's effective configuration.
dump() {
  if [[ -e $config ]]; then containerd --config $config config dump; else containerd config default; fi 2>/dev/null
}

# others: prints all effective settings except nutshell's.
others() { dump | awk '/^ *\[/ { ours = /runtimes\.nutshell[].]/ } !ours && NF && !/^ *imports/ { sub(/^ +/, ""); print }'; }

has_handler() {
  local dumped
  dumped=$(dump | sed -n '/runtimes\.nutshell\]/,/^ *\[.*options\]/p' | tr "'" '"')
  assert_contains "$dumped" 'runtime_type = "io.containerd.nutshell.v2"'
  assert_contains "$dumped" 'pod_annotations = ["io.containerd.nutshell.*"]'
  assert_contains "$dumped" 'container_annotations = ["io.containerd.nutshell.*"]'
  assert_contains "$dumped" 'privileged_without_host_devices = true'
}

second_install_changes_nothing_and_uninstall_restores_the_node() {
  clear_node
  configuration "$1"
  local before settings once
  before=$(tree)
  settings=$(others)
  assert_status 1 node status

  node install
  has_handler
  assert_equal "$settings" "$(others)"
  assert_equal 1 "$(restarts)"
  node status
  [[ $1 == nothing ]] || assert_equal "$(sed -n "s|\(.*\)  $config$|\1|p" <<<"$before")" \
    "$(sha256sum <$config.before-nutshell | cut -d ' ' -f 1)"

  once=$(times)
  node install
  assert_equal "$once" "$(times)"
  assert_equal 1 "$(restarts)"

  mkdir -p /var/cache/nutshell/kernels/entry
  node uninstall
  assert_equal "$before" "$(tree)"
  assert_equal 2 "$(restarts)"
  node uninstall
  assert_equal 2 "$(restarts)"
}

# forget_nutshell: removes nutshell from a node of start_node. The systemctl stub restarts the running containerd.
forget_nutshell() {
  config=/run/containerd.toml
  make_node
  rm /run/bin/containerd-shim-nutshell-v2
  awk '/^\[/ { ours = /runtimes\.nutshell/ } !ours' $config >/run/containerd.without
  mv /run/containerd.without $config
  echo "{ path=/run/bin/containerd ; argv[]=/run/bin/containerd --config $config ; ignore_errors=no }" \
    >"$work/unit/ExecStart"
  write_stub /run/bin/systemctl "case \$1 in
    show) cat $work/unit/\$3 ;;
    restart) source $lab/containerd.bash && stop_containerd && start_containerd ;;
  esac"
  systemctl restart
}

pod_runs_after_the_install_only() {
  local before output
  before=$(sha256sum $config)
  output=$(cri pods::run_to_completion nutshell 2>&1) && return 1
  assert_contains "$output" 'no runtime for'

  output=$(NUTSHELL_SHIM=$NUTSHELL_TEST_SHIM node install)
  assert_contains "$output" 'this host can run nutshell'
  cmp "$NUTSHELL_TEST_SHIM" /usr/local/bin/containerd-shim-nutshell-v2
  cri pods::run_to_completion nutshell
  node status

  node uninstall
  assert_equal "$before" "$(sha256sum $config)"
  output=$(cri pods::run_to_completion nutshell 2>&1) && return 1
  assert_contains "$output" 'no runtime for'
}

changes_after_the_install_survive_the_uninstall() {
  clear_node
  configuration default
  node install
  printf '\n[debug2]\n' >>$config
  sed -i '1i # first' $config
  node install
  has_handler
  node uninstall
  assert_equal "$(printf '# first\n'; containerd config default; printf '\n[debug2]')" "$(<$config)"
}

# refused TEXT: asserts that an installation fails with an error that contains TEXT, and changes nothing.
refused() {
  local before output
  before=$(tree)
  if output=$(node install 2>&1); then
    echo "installed: $output" >&2
    return 1
  fi
  assert_contains "$output" "$1"
  assert_equal "$before" "$(tree)"
  assert_equal 0 "$(restarts)"
}

unsupported_configuration_is_refused() {
  clear_node
  echo 'root = "/x"' >$config
  refused 'no line "version = …"'
  echo 'version = 1' >$config
  refused 'version 1'
  [[ $version != 1.7 ]] || { echo 'version = 3' >$config && refused 'config.toml'; }
  echo 'version = 9' >$config
  refused 'config.toml'
  echo 'version = ' >$config
  refused 'cannot read'
  printf 'version = 2\ndisabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.cri.v1.runtime"]\n' >$config
  refused 'disabled_plugins'
  printf 'version = 2\n' >/etc/containerd/other
  ln -sf other $config
  refused 'symbolic link'
  [[ $version == 1.7 ]] || {
    rm $config
    printf 'version = 3\nimports = [\n  "/x/*.toml",\n]\n' >$config
    refused 'line 2: imports spans several lines'
  }
}

existing_imports_are_kept() {
  clear_node
  use_containerd 2.1
  mkdir /etc/containerd/mine
  printf 'version = 3\n%s\n' "$(own_tables 3)" >/etc/containerd/mine/a.toml
  printf 'version = 3\nimports = ["/etc/containerd/mine/*.toml", ] # mine\n' >$config
  local before settings
  before=$(tree)
  settings=$(others)
  node install
  has_handler
  assert_equal "$settings" "$(others)"
  node uninstall
  assert_equal "$before" "$(tree)"
  # If the drop-in's folder is already imported, config.toml does not change.
  printf 'version = 3\nimports = ["/etc/containerd/conf.d/*.toml"]\n' >$config
  mkdir /etc/containerd/conf.d
  before=$(tree)
  node install
  has_handler
  assert_equal 2 "$(wc -l <$config)"
  node uninstall
  assert_equal "$before" "$(tree)"
}

import_in_1_7_is_refused() {
  clear_node
  use_containerd 1.7
  printf 'version = 2\n%s\n' "$(own_tables 2)" >/etc/containerd/other.toml
  printf 'version = 2\nimports = ["/etc/containerd/other.toml"]\n' >$config
  refused 'another imported file'
}

unknown_containerd_version_is_named() {
  clear_node
  configuration version_only
  local version_line
  for version_line in 'containerd github.com/containerd/containerd 1.6.8 9cd3357b7fd7218e4aec3eae239db1f68a5a6ec6' \
    'containerd github.com/containerd/containerd/v2 v2.5.0 x' 'containerd github.com/containerd/containerd 1.70.1 x' nonsense ''; do
    write_stub /run/bin/containerd "echo '$version_line'"
    refused "\"$version_line\""
  done
  write_stub /run/bin/containerd 'exit 1'
  refused '/run/bin/containerd --version failed'
  use_containerd 2.1
}

missing_service_and_k3s_are_named() {
  clear_node
  mv "$work/unit/ExecStart" "$work/unit/none"
  refused 'no containerd.service'
  mkdir -p /var/lib/rancher/k3s
  refused 'k3s'
  rm -r /var/lib/rancher
  mv "$work/unit/none" "$work/unit/ExecStart"
}

node_without_kvm_is_not_changed() {
  clear_node
  configuration default
  write_stub "$work/shim" 'echo "this host cannot run nutshell: /dev/kvm: stub" >&2; exit 1'
  refused '/dev/kvm: stub'
  set_up_stubs
}

unit_that_kills_its_containers_is_refused() {
  clear_node
  configuration default
  echo control-group >"$work/unit/KillMode"
  refused 'KillMode=control-group'
  echo process >"$work/unit/KillMode"
}

failed_restart_restores_the_configuration() {
  clear_node
  configuration default
  local before output
  before=$(tree)
  : >"$work/broken"
  output=$(node install 2>&1) && return 1
  assert_contains "$output" 'did not start with the handler'
  assert_equal "$before" "$(tree | grep -v containerd-shim-nutshell-v2)"
  # One restart with the handler, one without.
  assert_equal 2 "$(restarts)"
  rm "$work/broken"
  node install
  has_handler
  node uninstall
  assert_equal "$before" "$(tree)"
}

interrupted_restart_is_repeated() {
  clear_node
  configuration default
  # The restart kills the script.
  write_stub /run/bin/systemctl "case \$1 in show) cat $work/unit/\$3 ;; restart) kill -9 \$PPID ;; esac"
  assert_status 137 node install
  # The killed script has left its temporary folder.
  rm -r "$TMPDIR"/nutshell-node.*
  set_up_stubs
  assert_status 1 node status
  node install
  assert_equal 1 "$(restarts)"
  node status
  node uninstall
}

# start_shim ID: starts the installed executable as the shim of sandbox ID. It runs until descriptor $alive is closed.
start_shim() {
  mkfifo "$work/alive"
  /usr/local/bin/containerd-shim-nutshell-v2 -c 'read -r' shim -namespace k8s.io -id "$1" <"$work/alive" &
  shim=$!
  exec {alive}>"$work/alive"
  rm "$work/alive"
}

stop_shim() {
  exec {alive}>&-
  wait "$shim" || true
}

# write_shim_stub [SUFFIX]: makes a copy of bash the executable. A script would not do: /proc/PID/exe of its process is
# the interpreter. SUFFIX is appended to the copy, so that its content differs.
write_shim_stub() {
  cp --remove-destination /bin/bash "$work/shim"
  printf '%s' "${1:-}" >>"$work/shim"
  # bash takes the action `check` as the name of a script, which it finds in PATH.
  write_stub /run/bin/check true
}

running_executable_can_be_replaced() {
  clear_node
  configuration default
  write_shim_stub
  node install
  start_shim one
  write_shim_stub new
  node install
  cmp "$work/shim" /usr/local/bin/containerd-shim-nutshell-v2
  kill -0 "$shim"
  assert_contains "$(node status)" 'running machines: 1'
  assert_status 3 node uninstall
  stop_shim
  node uninstall
  rm /run/bin/check
  set_up_stubs
}

uninstall_is_refused_while_a_machine_runs() {
  clear_node
  configuration default
  write_shim_stub
  node install
  local before output
  before=$(tree)
  start_shim sandbox-7
  output=$(node uninstall 2>&1) && return 1
  assert_contains "$output" 'sandbox-7'
  assert_equal "$before" "$(tree)"
  stop_shim
  node uninstall
  rm /run/bin/check
  set_up_stubs
}

bin_sets_the_folder_of_the_executable() {
  local before
  for version in 1.7 2.1; do
    clear_node
    use_containerd "$version"
    configuration default
    before=$(tree)
    BIN=/etc/containerd/bin node install
    assert_contains "$(dump | tr "'" '"')" 'runtime_path = "/etc/containerd/bin/containerd-shim-nutshell-v2"'
    BIN=/etc/containerd/bin node uninstall
    rmdir /etc/containerd/bin
    assert_equal "$before" "$(tree)"
  done
}

install_works_from_inside_a_container() {
  clear_node
  configuration default
  local before
  before=$(tree)
  assert_status 1 env HOST=/sys "$work/node/node" install
  mkdir "$work/host"
  # In a separate mount namespace the node's root is a folder, and the paths at the root belong to the container.
  unshare --mount bash -c 'set -e
    mount --rbind / "$1/host"
    mount -t tmpfs tmpfs /etc/containerd
    mount -t tmpfs tmpfs /usr/local/bin
    export HOST=$1/host
    "$1/node/node" install
    "$1/node/node" status
    [[ -z $(ls /etc/containerd /usr/local/bin | grep -v :) ]]' - "$work"
  has_handler
  [[ -x /usr/local/bin/containerd-shim-nutshell-v2 ]]
  rmdir "$work/host"
  node uninstall
  assert_equal "$before" "$(tree)"
}

# write_curl_stub LABELS: the API server, whose node has these labels. Records the requests in $work/requests.
write_curl_stub() {
  write_stub /run/bin/curl "for last; do :; done
    echo \"\$last\" >>$work/requests
    while ((\$#)); do
      [[ \$1 != --data ]] || { echo \"patch \$2\" >>$work/requests; exit; }
      shift
    done
    echo '{\"metadata\":{\"labels\":{$1},\"managedFields\":[{\"f:io.containerd.nutshell/install\":{}}]}}'"
}

# start_pod: starts the script `pod` in the background and returns when it waits. A stub of sleep reports that.
start_pod() {
  rm -f "$work/requests"
  mkfifo "$work/waits"
  write_stub "$work/bin/sleep" "echo >$work/waits; exec /bin/sleep \"\$@\""
  PATH=$work/bin:$PATH NODE_NAME=worker KUBERNETES_SERVICE_HOST=10.0.0.1 "$work/node/pod" &
  pod=$!
  read -r -t 60 <"$work/waits"
  rm "$work/waits"
  write_stub "$work/bin/sleep" 'exec /bin/sleep "$@"'
}

# end_pod: ends the script as the kubelet does, with its sleep, which ends with the container.
end_pod() {
  local sleep
  sleep=$(pgrep -P "$pod" -x sleep)
  kill -TERM "$pod"
  local status=0
  wait "$pod" || status=$?
  kill "$sleep"
  rm -f /run/nutshell-node.ready
  return "$status"
}

pod_labels_the_node_and_uninstalls_without_the_install_label() {
  clear_node
  configuration default
  mkdir -p "$work/bin"
  local before server=https://10.0.0.1:443/api/v1/nodes/worker
  before=$(tree)
  write_curl_stub '"io.containerd.nutshell/install":"true"'
  start_pod
  assert_equal "$server
patch {\"metadata\":{\"labels\":{\"io.containerd.nutshell/ready\":\"true\"}}}" "$(<"$work/requests")"
  has_handler
  # The pod is updated or the node is drained: the installation stays.
  end_pod
  node status
  assert_equal 2 "$(grep -c "^$server" "$work/requests")"

  start_pod
  assert_equal 1 "$(restarts)"
  # The API server does not answer: the installation stays.
  write_stub /run/bin/curl 'exit 22'
  assert_status 1 end_pod
  node status

  write_curl_stub ''
  start_pod
  end_pod
  assert_equal 'patch {"metadata":{"labels":{"io.containerd.nutshell/ready":null}}}' "$(tail -n 1 "$work/requests")"
  assert_equal "$before" "$(tree)"
  rm -r "$work/bin" "$work/requests" /run/bin/curl
}

pod_removes_the_ready_label_from_a_node_that_fails() {
  clear_node
  configuration default
  write_curl_stub '"io.containerd.nutshell/install":"true"'
  write_stub "$work/shim" 'exit 1'
  rm -f "$work/requests"
  assert_status 1 env NODE_NAME=worker "$work/node/pod"
  assert_equal 'patch {"metadata":{"labels":{"io.containerd.nutshell/ready":null}}}' "$(tail -n 1 "$work/requests")"
  rm -r "$work/requests" /run/bin/curl
  set_up_stubs
}

manifests_are_consistent_with_the_scripts() {
  /usr/bin/python3 - "$deploy" <<'PYTHON'
import os, sys
try:
    import yaml
except ImportError:
    sys.exit("python3-yaml is not installed")
folder = sys.argv[1]

def read(name):
    with open(os.path.join(folder, name)) as file:
        return [document for document in yaml.safe_load_all(file) if document]

kustomization = read("kustomization.yaml")[0]
objects = {}
for name in kustomization["resources"]:
    for document in read(name):
        assert document["apiVersion"] and document["metadata"]["name"], name
        objects[document["kind"]] = document
kinds = {"RuntimeClass": "node.k8s.io/v1", "ServiceAccount": "v1", "DaemonSet": "apps/v1",
         "ClusterRole": "rbac.authorization.k8s.io/v1", "ClusterRoleBinding": "rbac.authorization.k8s.io/v1"}
assert {kind: document["apiVersion"] for kind, document in objects.items()} == kinds

runtime = objects["RuntimeClass"]
texts = {name: open(os.path.join(folder, name)).read() for name in ("node", "pod", "containerd-v2.toml", "containerd-v3.toml")}
for name in ("containerd-v2.toml", "containerd-v3.toml"):
    assert ".containerd.runtimes.%s]" % runtime["handler"] in texts[name], name
for label, value in runtime["scheduling"]["nodeSelector"].items():
    assert label in texts["pod"] and '"%s"' % value in texts["pod"], label
assert runtime["overhead"]["podFixed"]["memory"] == "130Mi"

daemon = objects["DaemonSet"]
template = daemon["spec"]["template"]
assert daemon["spec"]["selector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
pod = template["spec"]
assert "io.containerd.nutshell/install" in pod["nodeSelector"] and "io.containerd.nutshell/install" in texts["pod"]
account = objects["ServiceAccount"]["metadata"]
assert pod["serviceAccountName"] == account["name"] and daemon["metadata"]["namespace"] == account["namespace"]
binding = objects["ClusterRoleBinding"]
assert binding["roleRef"]["name"] == objects["ClusterRole"]["metadata"]["name"]
assert binding["subjects"] == [{"kind": "ServiceAccount", "name": account["name"], "namespace": account["namespace"]}]
assert pod["hostPID"] is True
container, = pod["containers"]
assert container["securityContext"]["privileged"] is True
assert container["image"] == kustomization["images"][0]["name"]
mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
assert set(mounts) == {volume["name"] for volume in pod["volumes"]}
environment = {variable["name"]: variable.get("value") for variable in container["env"]}
assert environment["HOST"] == mounts["host"]
scripts, = [volume["configMap"] for volume in pod["volumes"] if "configMap" in volume]
generated, = kustomization["configMapGenerator"]
assert scripts["name"] == generated["name"] and generated["namespace"] == account["namespace"]
assert scripts["defaultMode"] == 0o755
# The ConfigMap has every file that the scripts read.
assert sorted(generated["files"]) == sorted(texts)
assert container["command"] == [mounts["scripts"] + "/pod"]
# The image has the executable at the path that the script uses.
dockerfile = open(os.path.join(folder, "Dockerfile")).read()
assert "COPY --chmod=755 containerd-shim-nutshell-v2 %s\n" % environment["NUTSHELL_SHIM"] in dockerfile

# Examples of virtual machines: their handler, their annotations and the volumes that they mount exist.
documented = open(os.path.join(folder, "../docs/VM.md")).read()
examples = [name for name in os.listdir(os.path.join(folder, "examples")) if name.endswith(".yaml")]
assert examples
for name in examples:
    for document in read("examples/" + name):
        assert document["apiVersion"] and document["metadata"]["name"], name
        if document["kind"] not in ("Pod", "StatefulSet"):
            continue
        template = document["spec"].get("template", document)
        pod = template["spec"]
        assert pod["runtimeClassName"] == runtime["metadata"]["name"], name
        volumes = {volume["name"] for volume in pod.get("volumes", [])}
        volumes |= {claim["metadata"]["name"] for claim in document["spec"].get("volumeClaimTemplates", [])}
        machine, = pod["containers"]
        assert machine["command"] == ["vm"], name
        for container in pod.get("initContainers", []) + [machine]:
            assert {mount["name"] for mount in container.get("volumeMounts", [])} <= volumes, name
        paths = {mount["mountPath"] for mount in machine["volumeMounts"]}
        for annotation in template["metadata"].get("annotations", {}):
            key = annotation.removeprefix("io.containerd.nutshell.vm.")
            disk = key.removeprefix("disk.")
            assert disk == key and "`%s`" % annotation in documented or "/disks/" + disk in paths, annotation
PYTHON
}
