//! Namespaces and settings that the containers of a pod share.

use std::collections::BTreeMap;

use crate::{
    messages::{DnsConfig, NamespaceMode},
    pod::{Container, Handler, Pod, namespaces, security, share_pid_namespace},
};

/// The namespaces of a container's processes: type and identifier.
fn namespaces_of(container: &Container) -> BTreeMap<String, String> {
    container
        .sh("for name in ipc mnt net pid uts; do echo $name $(readlink /proc/self/ns/$name); done")
        .lines()
        .map(|line| line.split_once(' ').unwrap())
        .map(|(name, token)| (name.to_owned(), token.to_owned()))
        .collect()
}

/// Asserts that two containers have the same namespaces of the types in `shared`, and different ones otherwise.
fn assert_shared(left: &Container, right: &Container, shared: &[&str]) {
    let (left, right) = (namespaces_of(left), namespaces_of(right));
    for (name, token) in &left {
        assert_eq!(
            token == &right[name],
            shared.contains(&name.as_str()),
            "{name}: {left:?} {right:?}"
        );
    }
}

pub(crate) fn separate_processes(handler: Handler) {
    let pod = Pod::run(handler);
    let left = pod.start("left", &["sleep", "11111"]);
    let right = pod.start("right", &["sleep", "22222"]);
    assert_shared(&left, &right, &["ipc", "net", "uts"]);
    let processes = left.sh("ps -o pid,args");
    assert!(processes.contains("    1 sleep 11111"), "{processes}");
    assert!(!processes.contains("sleep 22222"), "{processes}");

    // Shared: loopback interface, host name, /dev/shm, message queues.
    left.sh("httpd -p 127.0.0.1:7777 -h /etc");
    assert_eq!(
        right.sh("wget -q -O - http://127.0.0.1:7777/hostname"),
        pod.config.hostname
    );
    assert_eq!(right.sh("hostname"), pod.config.hostname);
    left.sh("echo shared >/dev/shm/note; touch /dev/mqueue/queue");
    assert_eq!(right.sh("cat /dev/shm/note"), "shared");
    assert_eq!(right.sh("ls /dev/mqueue"), "queue");
    // /dev/shm outlives the container that wrote to it.
    left.stop(0);
    left.remove();
    assert_eq!(right.sh("cat /dev/shm/note"), "shared");
    assert_eq!(right.sh("df -m /dev/shm | awk 'NR == 2 { print $2 }'"), "64");
    pod.remove();
}

pub(crate) fn shared_processes(handler: Handler) {
    let pod = Pod::run_with(handler, share_pid_namespace);
    let left = pod.start("left", &["sleep", "11111"]);
    let right = pod.start("right", &["sleep", "22222"]);
    assert_shared(&left, &right, &["ipc", "net", "pid", "uts"]);
    let processes = left.sh("ps -o pid,args");
    assert!(
        processes.contains("sleep 11111") && processes.contains("sleep 22222"),
        "{processes}"
    );
    assert!(!processes.contains("    1 sleep"), "{processes}");
    // A process of one container can kill a process of the other.
    left.sh("kill -9 $(ps -o pid,args | awk '$2 == \"sleep\" && $3 == 22222 { print $1 }')");
    assert_eq!(right.wait().exit_code, 137);
    // Stop of a container ends its processes only.
    let third = pod.start("third", &["sleep", "33333"]);
    left.stop(0);
    assert_eq!(left.wait().exit_code, 137);
    assert_eq!(third.sh("ps -o args | grep -c '^sleep'"), "1");
    pod.remove();
}

pub(crate) fn files_and_settings(handler: Handler) {
    let pod = Pod::run_with(handler, |config| {
        config.dns_config = Some(DnsConfig {
            servers: vec!["10.88.0.1".into()],
            searches: vec!["tests.test".into(), "cluster.test".into()],
            options: vec!["ndots:5".into()],
        });
        let sysctls = &mut config.linux.get_or_insert_default().sysctls;
        sysctls.insert("net.ipv4.ip_unprivileged_port_start".into(), "79".into());
        sysctls.insert("kernel.shm_rmid_forced".into(), "1".into());
    });
    let first = pod.start("first", &["sleep", "1000"]);
    let second = pod.start_with(
        "second",
        &["httpd", "-f", "-p", "127.0.0.1:80", "-h", "/etc"],
        |config| {
            security(config).run_as_user = Some(crate::messages::Int64Value { value: 65534 });
        },
    );
    for container in [&first, &second] {
        assert_eq!(
            container.sh("hostname; cat /etc/hostname"),
            [pod.config.hostname.as_str(); 2].join("\n")
        );
        let resolver = container.sh("cat /etc/resolv.conf");
        assert!(
            resolver.lines().any(|line| line == "nameserver 10.88.0.1"),
            "{resolver}"
        );
        assert!(
            resolver.lines().any(|line| line == "search tests.test cluster.test"),
            "{resolver}"
        );
        assert!(resolver.lines().any(|line| line == "options ndots:5"), "{resolver}");
        assert!(container.sh("cat /etc/hosts").contains("localhost"));
        assert_eq!(container.sh("cat /proc/sys/net/ipv4/ip_unprivileged_port_start"), "79");
        assert_eq!(container.sh("cat /proc/sys/kernel/shm_rmid_forced"), "1");
    }
    // The container has no capability to bind port 80: the sysctl allows it.
    assert_eq!(first.sh("wget -q -O - http://127.0.0.1/hostname"), pod.config.hostname);
    pod.remove();
}

pub(crate) fn host_namespaces_are_refused(handler: Handler) {
    type Field = fn(&mut crate::messages::NamespaceOption);
    let fields: [(&str, Field); 3] = [
        ("hostNetwork", |options| options.network = NamespaceMode::Node.into()),
        ("hostPID", |options| options.pid = NamespaceMode::Node.into()),
        ("hostIPC", |options| options.ipc = NamespaceMode::Node.into()),
    ];
    for (name, set) in fields {
        // containerd 2.1 crashes before it calls the runtime (containerd issue 12983).
        if handler == Handler::NutshellSandboxService && name == "hostNetwork" {
            continue;
        }
        let refused = Pod::try_run(handler, |config| set(namespaces(config))).map(drop);
        let message = refused.expect_err(name).message;
        assert!(message.contains(name), "{name}: {message}");
    }
}
