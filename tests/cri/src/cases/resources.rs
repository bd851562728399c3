//! What containers use and may use.

use std::{
    thread::sleep,
    time::{Duration, Instant},
};

use crate::{
    client::call,
    messages::{
        ContainerStats, ContainerStatsRequest, LinuxContainerResources, LinuxPodSandboxStats, PodSandboxConfig,
        PodSandboxStatsRequest, UpdateContainerResourcesRequest,
    },
    pod::{Container, Handler, Pod, resources},
    wait_until,
};

const PERIOD: i64 = 100_000;

fn limits(cpus_in_percent: i64, memory_in_mib: i64) -> LinuxContainerResources {
    LinuxContainerResources {
        cpu_period: PERIOD,
        cpu_quota: cpus_in_percent * PERIOD / 100,
        cpu_shares: cpus_in_percent * 1024 / 100,
        memory_limit_in_bytes: memory_in_mib << 20,
        ..Default::default()
    }
}

/// Tells the pod what its containers may use together, as a kubelet does.
fn sum_of(config: &mut PodSandboxConfig, sum: LinuxContainerResources) {
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

/// CPU time in nanoseconds, and when that was.
fn cpu(stats: &ContainerStats) -> (u64, i64) {
    let cpu = stats.cpu.clone().unwrap();
    (cpu.usage_core_nano_seconds.unwrap().value, cpu.timestamp)
}

/// How many CPUs a container uses, in percent of one, measured for some seconds.
fn load(container: &Container) -> u64 {
    let (from, start) = cpu(&stats(container));
    sleep(Duration::from_secs(4));
    let (to, end) = cpu(&stats(container));
    (to - from) * 100 / u64::try_from(end - start).unwrap()
}

pub(crate) fn statistics(handler: Handler) {
    let pod = Pod::run_with(handler, |config| sum_of(config, limits(100, 384)));
    let busy = pod.start_with("busy", &["sh", "-c", "while :; do :; done"], |config| {
        *resources(config) = limits(30, 64);
    });
    let idle = pod.start_with(
        "idle",
        &[
            "sh",
            "-c",
            "dd if=/dev/zero of=/dev/shm/held bs=1M count=40; sleep 1000",
        ],
        |config| {
            *resources(config) = limits(50, 128);
        },
    );
    wait_until("40 MiB that are held", || {
        (working_set(&stats(&idle)) >= 40 << 20).then_some(())
    });
    let before = pod_stats(&pod);
    let percent = load(&busy);
    assert!((20..=40).contains(&percent), "30 % of a CPU are counted as {percent} %");
    let percent = load(&idle);
    assert!(percent <= 5, "nothing is counted as {percent} % of a CPU");
    assert!(working_set(&stats(&idle)) < 56 << 20, "{}", working_set(&stats(&idle)));
    assert!(working_set(&stats(&busy)) < 16 << 20, "{}", working_set(&stats(&busy)));

    let after = pod_stats(&pod);
    assert_eq!(after.containers.len(), 2);
    let used = |stats: &LinuxPodSandboxStats| stats.cpu.clone().unwrap().usage_core_nano_seconds.unwrap().value;
    // 8 s at 30 % are 2.4 s; a machine has something to do beside its containers.
    assert!(used(&after) - used(&before) > 1_600_000_000, "{before:?} {after:?}");
    assert!(after.memory.unwrap().working_set_bytes.unwrap().value >= 40 << 20);
    let interface = after.network.unwrap().default_interface.unwrap();
    assert_eq!(interface.name, "eth0");
    pod.remove();
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

fn seen_limits(container: &Container) -> String {
    container.sh("cat /sys/fs/cgroup/cpu.max /sys/fs/cgroup/memory.max")
}

pub(crate) fn updated_limits(handler: Handler) {
    let pod = Pod::run_with(handler, |config| sum_of(config, limits(100, 128)));
    let container = pod.start_with("one", &["sh", "-c", "while :; do :; done"], |config| {
        *resources(config) = limits(60, 96);
    });
    let other = pod.start_with("other", &["sleep", "1000"], |config| {
        *resources(config) = limits(40, 32)
    });
    assert_eq!(seen_limits(&container), format!("60000 100000\n{}", 96 << 20));
    update(&container, limits(20, 48));
    assert_eq!(seen_limits(&container), format!("20000 100000\n{}", 48 << 20));
    assert_eq!(seen_limits(&other), format!("40000 100000\n{}", 32 << 20));
    let percent = load(&container);
    assert!((12..=28).contains(&percent), "20 % of a CPU are counted as {percent} %");
    // The new limit is one: what is beyond it is not had.
    update(&container, limits(100, 48));
    let answer = container.exec(&["sh", "-c", "dd if=/dev/zero of=/dev/null bs=64M count=1; exit $?"]);
    assert_eq!(answer.exit_code, 137);
    pod.remove();
}

fn processors(container: &Container) -> u32 {
    container.sh("nproc").parse().unwrap()
}

/// What the kernel has, in MiB.
fn memory(container: &Container) -> u64 {
    let kib = container.sh("awk '/^MemTotal:/ { print $2 }' /proc/meminfo");
    kib.parse::<u64>().unwrap() >> 10
}

/// More than the pod was started with, by a change and by a further container, and less again.
pub(crate) fn resize_up(handler: Handler) {
    let pod = Pod::run_with(handler, |config| sum_of(config, limits(50, 64)));
    let container = pod.start_with("one", &["sleep", "1000"], |config| *resources(config) = limits(50, 64));
    let started = container.status().started_at;
    update(&container, limits(200, 384));
    assert_eq!(seen_limits(&container), format!("200000 100000\n{}", 384 << 20));
    let start = Instant::now();
    let answer = container.exec(&["sh", "-c", "dd if=/dev/zero of=/dev/null bs=320M count=1"]);
    assert_eq!(answer.exit_code, 0, "{}", String::from_utf8_lossy(&answer.stderr));
    assert!(start.elapsed() < Duration::from_secs(60));
    assert!(processors(&container) >= 2);
    assert!(memory(&container) >= 384, "{} MiB", memory(&container));

    let further = pod.start_with("further", &["sleep", "1000"], |config| {
        *resources(config) = limits(50, 512)
    });
    let answer = further.exec(&["sh", "-c", "dd if=/dev/zero of=/dev/null bs=480M count=1"]);
    assert_eq!(answer.exit_code, 0, "{}", String::from_utf8_lossy(&answer.stderr));
    let most = memory(&further);
    assert!(most >= 384 + 512, "{most} MiB");

    if handler.is_nutshell() {
        further.stop(0);
        update(&container, limits(50, 64));
        wait_until("one processor, as at the start", || {
            (processors(&container) == 1).then_some(())
        });
        wait_until("less memory", || (memory(&container) < most - 256).then_some(()));
        // And up again.
        update(&container, limits(200, 384));
        assert_eq!(processors(&container), 2);
        assert!(memory(&container) >= 384, "{} MiB", memory(&container));
    }
    assert_eq!(container.status().started_at, started);
    pod.remove();
}
