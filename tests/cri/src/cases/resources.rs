//! Statistics and limits of containers, and the size of the machine.

use std::{
    fs,
    path::Path,
    thread::sleep,
    time::{Duration, Instant},
};

use crate::{
    client::call,
    host::{cgroups_at, read_log},
    messages::{
        ContainerStats, ContainerStatsRequest, LinuxContainerResources, LinuxPodSandboxStats,
        ListContainerStatsRequest, ListPodSandboxStatsRequest, PodSandboxConfig, PodSandboxStatsRequest,
        UpdateContainerResourcesRequest,
    },
    pod::{Container, DEBIAN, Handler, Pod, image, resources},
    wait::wait_until,
};

/// The CPU period of all limits, in microseconds.
const CPU_PERIOD: i64 = 100_000;

fn limits(percent_of_cpu: i64, memory_mib: i64) -> LinuxContainerResources {
    LinuxContainerResources {
        cpu_period: CPU_PERIOD,
        cpu_quota: percent_of_cpu * CPU_PERIOD / 100,
        cpu_shares: percent_of_cpu * 1024 / 100,
        memory_limit_in_bytes: memory_mib << 20,
        ..Default::default()
    }
}

/// Sets the sum of the limits of all containers in the pod's config, as a kubelet does.
fn set_sum(config: &mut PodSandboxConfig, sum: LinuxContainerResources) {
    config.linux.get_or_insert_default().resources = Some(sum);
}

fn stats(container: &Container) -> ContainerStats {
    let container_id = container.id.clone();
    call(&ContainerStatsRequest { container_id }).unwrap().stats.unwrap()
}

fn pod_stats(pod: &Pod) -> LinuxPodSandboxStats {
    let pod_sandbox_id = pod.id.clone();
    call(&PodSandboxStatsRequest { pod_sandbox_id })
        .unwrap()
        .stats
        .unwrap()
        .linux
        .unwrap()
}

fn working_set(stats: &ContainerStats) -> u64 {
    stats.memory.clone().unwrap().working_set_bytes.unwrap().value
}

/// CPU time and timestamp of the statistics, both in nanoseconds.
fn cpu(stats: &ContainerStats) -> (u64, i64) {
    let cpu = stats.cpu.clone().unwrap();
    (cpu.usage_core_nano_seconds.unwrap().value, cpu.timestamp)
}

/// Measures for four seconds how much CPU time a container uses, in percent of one CPU.
fn load(container: &Container) -> u64 {
    let (used_before, start) = cpu(&stats(container));
    sleep(Duration::from_secs(4));
    let (used_after, end) = cpu(&stats(container));
    (used_after - used_before) * 100 / u64::try_from(end - start).unwrap()
}

/// Uses 4 s of CPU time and then sleeps. Prints the CPU time of its control group in nanoseconds: the time before the
/// load plus the time of the load.
const KNOWN_LOAD: &str = "import time
start = time.process_time_ns()
before = int(open('/sys/fs/cgroup/cpu.stat').readline().split()[1]) * 1000
while time.process_time_ns() < start + 4 * 10**9: pass
print(before + time.process_time_ns() - start, flush=True)
time.sleep(1000)";

/// Allocates 60 MiB, far more than the shell uses, prints `held`, and sleeps.
const KNOWN_MEMORY: &str = "dd if=/dev/zero of=/dev/shm/held bs=1M count=60 2>/dev/null && echo held; exec sleep 1000";

pub(crate) fn statistics(handler: Handler) {
    let pod = Pod::run_with(handler, |config| set_sum(config, limits(140, 384)));
    let before = pod_stats(&pod);
    let busy = pod.start_with("busy", &["python3", "-c", KNOWN_LOAD], |config| {
        config.image = image(DEBIAN);
        *resources(config) = limits(90, 128);
    });
    let holding = pod.start_with("holding", &["sh", "-c", KNOWN_MEMORY], |config| {
        config.image = image(DEBIAN);
        *resources(config) = limits(50, 256);
    });
    let first_line = |container: &Container| read_log(&container.log).first().map(|line| line.text.clone());
    wait_until("60 MiB that are held", || first_line(&holding));
    let used_by_load: u64 = wait_until("4 s of CPU time", || first_line(&busy)).parse().unwrap();

    let assert_within_5_percent = |expected: u64, reported: u64| {
        assert!(
            reported.abs_diff(expected) * 20 <= expected,
            "{reported} instead of {expected}"
        );
    };
    assert_within_5_percent(used_by_load, cpu(&stats(&busy)).0);
    assert_within_5_percent(60 << 20, working_set(&stats(&holding)));
    let percent = load(&holding);
    assert!(percent <= 5, "an idle container uses {percent} % of a CPU");

    let after = pod_stats(&pod);
    assert_eq!(after.containers.len(), 2);
    let used = |stats: &LinuxPodSandboxStats| stats.cpu.clone().unwrap().usage_core_nano_seconds.unwrap().value;
    // The machine itself uses CPU time too.
    assert!(used(&after) - used(&before) >= used_by_load, "{before:?} {after:?}");
    assert!(after.memory.clone().unwrap().working_set_bytes.unwrap().value >= 60 << 20);
    let traffic = |stats: &LinuxPodSandboxStats| {
        let interface = stats.network.clone().unwrap().default_interface.unwrap();
        assert_eq!(interface.name, "eth0");
        (interface.tx_bytes.unwrap().value, interface.rx_bytes.unwrap().value)
    };
    let before = traffic(&after);
    busy.sh(
        "python3 -c \"import socket; socket.create_connection(('10.88.0.1', 9)).close()\" 2>/dev/null; \
                bash -c 'for i in {1..100}; do printf %1000s >/dev/udp/10.88.0.1/9; done'",
    );
    let (sent, received) = wait_until("bytes that were sent", || {
        let now = traffic(&pod_stats(&pod));
        (now.0 >= before.0 + 100_000).then_some((now.0 - before.0, now.1 - before.1))
    });
    assert!(sent < 150_000, "{sent} bytes instead of 100 KB");
    assert!(received > 0, "no received bytes");

    // The calls of `crictl stats` and `crictl statsp`.
    let listed = call(&ListContainerStatsRequest {}).unwrap().stats;
    let listed = listed
        .iter()
        .find(|stats| stats.attributes.as_ref().unwrap().id == holding.id);
    assert_within_5_percent(60 << 20, working_set(listed.unwrap()));
    let listed = call(&ListPodSandboxStatsRequest {}).unwrap().stats;
    let listed = listed
        .iter()
        .find(|stats| stats.attributes.as_ref().unwrap().id == pod.id);
    assert!(used(listed.unwrap().linux.as_ref().unwrap()) >= used_by_load);
    pod.remove();
}

/// The control group of a pod as a kubelet names it with the cgroupfs and with the systemd driver, and the group below
/// it that containerd requests for the sandbox.
pub(crate) fn cgroup_of_both_drivers(handler: Handler) {
    let parents = Path::new("/sys/fs/cgroup/kubepods.slice");
    fs::create_dir(parents).unwrap();
    fs::write(
        parents.join("cgroup.subtree_control"),
        "+cpu +cpuset +io +memory +pids +hugetlb",
    )
    .unwrap();
    for (parent, child) in [
        ("/kubepods/podbyfolder", "ID"),
        ("/kubepods.slice/kubepods-podbyslice.slice", "cri-containerd-ID.scope"),
    ] {
        let pod = Pod::run_with(handler, |config| {
            config.linux.as_mut().unwrap().cgroup_parent = parent.into();
        });
        let container = pod.start("one", &["sleep", "1000"]);
        assert_eq!(container.sh("echo here"), "here");
        let group = pod.cgroup.join(child.replace("ID", &pod.id));
        let members: Vec<_> = fs::read_to_string(group.join("cgroup.procs"))
            .unwrap_or_else(|error| panic!("{}: {error}; groups: {:?}", group.display(), cgroups_at(&pod.cgroup)))
            .lines()
            .map(|pid| {
                fs::read_to_string(format!("/proc/{pid}/comm"))
                    .unwrap()
                    .trim()
                    .to_owned()
            })
            .collect();
        // The kernel may add a thread of KVM.
        for role in ["nutshell-vmm", "nutshell-fs"] {
            assert!(
                members.iter().any(|name| name == role),
                "{}: {members:?}",
                group.display()
            );
        }
        pod.remove();
    }
    fs::remove_dir(parents).unwrap();
}

fn update(container: &Container, limits: LinuxContainerResources) {
    call(&UpdateContainerResourcesRequest {
        container_id: container.id.clone(),
        linux: Some(limits.clone()),
    })
    .unwrap();
    let known = container.status().resources.unwrap().linux.unwrap();
    assert_eq!(known.memory_limit_in_bytes, limits.memory_limit_in_bytes);
    assert_eq!(known.cpu_quota, limits.cpu_quota);
}

/// The limits of a container's control group in the guest.
fn effective_limits(container: &Container) -> String {
    container.sh("cat /sys/fs/cgroup/cpu.max /sys/fs/cgroup/memory.max")
}

pub(crate) fn updated_limits(handler: Handler) {
    let pod = Pod::run_with(handler, |config| set_sum(config, limits(100, 128)));
    let container = pod.start_with("one", &["sh", "-c", "while :; do :; done"], |config| {
        *resources(config) = limits(60, 96);
    });
    let other = pod.start_with("other", &["sleep", "1000"], |config| {
        *resources(config) = limits(40, 32)
    });
    assert_eq!(effective_limits(&container), format!("60000 100000\n{}", 96 << 20));
    update(&container, limits(20, 48));
    assert_eq!(effective_limits(&container), format!("20000 100000\n{}", 48 << 20));
    assert_eq!(effective_limits(&other), format!("40000 100000\n{}", 32 << 20));
    let percent = load(&container);
    assert!((12..=28).contains(&percent), "{percent} % instead of 20 % of a CPU");
    // The new memory limit is enforced.
    update(&container, limits(100, 48));
    let response = container.exec(&["sh", "-c", "dd if=/dev/zero of=/dev/null bs=64M count=1; exit $?"]);
    assert_eq!(response.exit_code, 137);
    pod.remove();
}

/// The number of CPUs that a container sees.
fn cpus(container: &Container) -> u32 {
    container.sh("nproc").parse().unwrap()
}

/// The guest's memory in MiB.
fn total_memory(container: &Container) -> u64 {
    let kib = container.sh("awk '/^MemTotal:/ { print $2 }' /proc/meminfo");
    kib.parse::<u64>().unwrap() >> 10
}

/// The value of a file in the pod's control group on the host, in MiB.
fn cgroup_mib(pod: &Pod, file: &str) -> u64 {
    let text = fs::read_to_string(pod.cgroup.join(file)).unwrap();
    text.trim().parse::<u64>().unwrap() >> 20
}

/// The machine grows beyond its initial size with an update and with another container, and shrinks again.
pub(crate) fn machine_resize(handler: Handler) {
    let pod = Pod::run_with(handler, |config| set_sum(config, limits(50, 64)));
    let container = pod.start_with("one", &["sleep", "1000"], |config| *resources(config) = limits(50, 64));
    let started = container.status().started_at;
    update(&container, limits(200, 384));
    assert_eq!(effective_limits(&container), format!("200000 100000\n{}", 384 << 20));
    let start = Instant::now();
    let response = container.exec(&["sh", "-c", "dd if=/dev/zero of=/dev/null bs=320M count=1"]);
    assert_eq!(response.exit_code, 0, "{}", String::from_utf8_lossy(&response.stderr));
    assert!(start.elapsed() < Duration::from_secs(60));
    assert!(cpus(&container) >= 2);
    assert!(total_memory(&container) >= 384, "{} MiB", total_memory(&container));
    if handler.is_nutshell() {
        let (peak, current) = (
            || cgroup_mib(&pod, "memory.peak"),
            || cgroup_mib(&pod, "memory.current"),
        );
        assert!(peak() >= 320, "{} MiB", peak());
        wait_until("memory returned to the host", || {
            (current() < peak() - 200).then_some(())
        });
    }

    let further = pod.start_with("further", &["sleep", "1000"], |config| {
        *resources(config) = limits(50, 512)
    });
    let response = further.exec(&["sh", "-c", "dd if=/dev/zero of=/dev/null bs=480M count=1"]);
    assert_eq!(response.exit_code, 0, "{}", String::from_utf8_lossy(&response.stderr));
    let largest = total_memory(&further);
    assert!(largest >= 384 + 512, "{largest} MiB");

    if handler.is_nutshell() {
        further.stop(0);
        wait_until("less memory after the stop", || {
            (total_memory(&container) < largest - 256).then_some(())
        });
        update(&container, limits(50, 64));
        wait_until("one CPU, as at the start", || (cpus(&container) == 1).then_some(()));
        // The machine can grow again.
        update(&container, limits(200, 384));
        assert_eq!(cpus(&container), 2);
        assert!(total_memory(&container) >= 384, "{} MiB", total_memory(&container));
    }
    assert_eq!(container.status().started_at, started);
    pod.remove();
}

/// Writes and reads more than fits into the page cache, and fails with a report if the content differs.
const WRITE_AND_READ: &str = "set -e
round=0
while :; do
  round=$((round + 1))
  for file in 0 1 2 3; do
    dd if=/dev/urandom of=/data$file bs=1M count=3 2>/dev/null
    sha256sum /data$file >>/sums
  done
  sync
  sha256sum -c /sums >/report 2>&1 || { cat /report; exit 1; }
  rm /sums
  echo round $round
done";

/// New memory is used at once, by two containers that write and read files during the growth.
pub(crate) fn growth_under_load(handler: Handler) {
    let pod = Pod::run_with(handler, |config| set_sum(config, limits(100, 64)));
    let busy = ["first", "second"].map(|name| {
        pod.start_with(name, &["sh", "-c", WRITE_AND_READ], |config| {
            *resources(config) = limits(50, 16)
        })
    });
    let growing = pod.start_with("growing", &["sleep", "1000"], |config| {
        *resources(config) = limits(50, 16)
    });
    let rounds = |container: &Container| container.output("stdout").lines().count();
    for memory_mib in [96, 320, 640] {
        let before = busy.each_ref().map(rounds);
        update(&growing, limits(50, memory_mib));
        for (container, before) in busy.iter().zip(before) {
            wait_until("another round of files", || {
                assert_eq!(container.status().exit_code, 0, "{}", container.output("stdout"));
                (rounds(container) > before).then_some(())
            });
        }
    }
    pod.remove();
}
