//! The reports as OpenMetrics text (OpenMetrics 1.0, "Text Format"), for the node exporter's textfile collector or
//! another scraper.

use std::{collections::BTreeMap, fmt::Write};

use crate::shim::report::{ContainerReport, DeviceReport, MachineReport, ShimReport};

/// A family of metrics: its name, unit and help text, and the function that returns the value for a `T`, if there is
/// one.
struct Family<T> {
    name: &'static str,
    unit: Option<&'static str>,
    help: &'static str,
    value: fn(&T) -> Option<f64>,
}

/// Gauges of a container.
const CONTAINER_FAMILIES: [Family<ContainerReport>; 8] = [
    Family {
        name: "nutshell_container_running",
        unit: None,
        help: "1 while the container or sandbox runs, else 0.",
        value: |container| Some(f64::from(u8::from(container.state == "running"))),
    },
    Family {
        name: "nutshell_container_age_seconds",
        unit: Some("seconds"),
        help: "Time since the creation of the container began.",
        value: |container| Some(to_float(container.age_seconds)),
    },
    Family {
        name: "nutshell_container_create_seconds",
        unit: Some("seconds"),
        help: "From the request of the container's creation until it was created.",
        value: |container| container.create_milliseconds.map(to_seconds),
    },
    Family {
        name: "nutshell_container_started_seconds",
        unit: Some("seconds"),
        help: "From the request of the container's creation until it was started.",
        value: |container| container.started_milliseconds.map(to_seconds),
    },
    Family {
        name: "nutshell_container_start_seconds",
        unit: Some("seconds"),
        help: "Duration of the call that started the container.",
        value: |container| container.start_milliseconds.map(to_seconds),
    },
    Family {
        name: "nutshell_machine_boot_seconds",
        unit: Some("seconds"),
        help: "From the boot command until the agent in the container's virtual machine was ready.",
        value: |container| container.machine.boot_milliseconds.map(to_seconds),
    },
    Family {
        name: "nutshell_machine_memory_bytes",
        unit: Some("bytes"),
        help: "Memory of the container's virtual machine, which a pod's containers share.",
        value: |container| Some(to_float(container.machine.memory_bytes)),
    },
    Family {
        name: "nutshell_machine_vcpus",
        unit: None,
        help: "Processors of the container's virtual machine, which a pod's containers share.",
        value: |container| Some(f64::from(container.machine.vcpus)),
    },
];

/// Gauges of a machine.
const MACHINE_FAMILIES: [Family<MachineReport>; 5] = [
    Family {
        name: "nutshell_machine_answers",
        unit: None,
        help: "1 if the vmm answered the request for its devices' counters, else 0.",
        value: |machine| Some(f64::from(u8::from(machine.devices_error.is_none()))),
    },
    Family {
        name: "nutshell_machine_spawn_seconds",
        unit: Some("seconds"),
        help: "From the request of the machine until its vmm process was started, 0 if that was before the request.",
        value: |machine| Some(to_seconds(machine.phases.spawn_milliseconds)),
    },
    Family {
        name: "nutshell_machine_vmm_ready_seconds",
        unit: Some("seconds"),
        help: "From the request of the machine until the vmm had built it.",
        value: |machine| machine.phases.vmm_ready_milliseconds.map(to_seconds),
    },
    Family {
        name: "nutshell_machine_kernel_seconds",
        unit: Some("seconds"),
        help: "From the request of the machine until its kernel did its first I/O.",
        value: |machine| machine.phases.kernel_milliseconds.map(to_seconds),
    },
    Family {
        name: "nutshell_machine_agent_ready_seconds",
        unit: Some("seconds"),
        help: "From the request of the machine until the agent in it was ready.",
        value: |machine| machine.phases.agent_ready_milliseconds.map(to_seconds),
    },
];

/// Counters of a device. A sample has the name of its family and `_total`.
const DEVICE_FAMILIES: [Family<DeviceReport>; 5] = [
    Family {
        name: "nutshell_device_requests",
        unit: None,
        help: "Requests, packets or messages of the device.",
        value: |device| Some(to_float(device.requests)),
    },
    Family {
        name: "nutshell_device_errors",
        unit: None,
        help: "Requests that failed, data that was lost, and queues that are no longer served.",
        value: |device| Some(to_float(device.errors)),
    },
    Family {
        name: "nutshell_device_stalls",
        unit: None,
        help: "How often a queue or stream of the device made no progress for 10 s.",
        value: |device| Some(to_float(device.stalls)),
    },
    Family {
        name: "nutshell_device_to_guest_bytes",
        unit: Some("bytes"),
        help: "Bytes that the guest received from the device.",
        value: |device| Some(to_float(device.bytes_to_guest)),
    },
    Family {
        name: "nutshell_device_from_guest_bytes",
        unit: Some("bytes"),
        help: "Bytes that the guest sent to the device.",
        value: |device| Some(to_float(device.bytes_from_guest)),
    },
];

/// All metrics of these shims.
pub(super) fn to_openmetrics<'a>(reports: impl Iterator<Item = &'a ShimReport> + Clone) -> String {
    let mut containers = Vec::new();
    // By namespace and sandbox: a pod's containers share its machine.
    let mut machines = BTreeMap::new();
    for report in reports {
        for container in &report.containers {
            containers.push((container_labels(report, container), container));
            let (namespace, machine) = (report.namespace.as_str(), &container.machine);
            machines.insert((namespace, machine.sandbox.as_str()), machine);
        }
    }
    let mut devices = Vec::new();
    for ((namespace, sandbox), machine) in &machines {
        for device in &machine.devices {
            let labels = [
                ("namespace", *namespace),
                ("sandbox", sandbox),
                ("device", &device.name),
            ];
            devices.push((to_labels(&labels), device));
        }
    }
    let machines: Vec<_> = machines
        .into_iter()
        .map(|((namespace, sandbox), machine)| {
            let labels = [("namespace", namespace), ("sandbox", sandbox)];
            (to_labels(&labels), machine)
        })
        .collect();

    let mut text = String::new();
    write_families(&mut text, "gauge", &CONTAINER_FAMILIES, &containers);
    write_families(&mut text, "gauge", &MACHINE_FAMILIES, &machines);
    write_families(&mut text, "counter", &DEVICE_FAMILIES, &devices);
    text.push_str("# EOF\n");
    text
}

/// Writes families of the type `kind`. `sources` have the labels of their samples.
fn write_families<T>(text: &mut String, kind: &str, families: &[Family<T>], sources: &[(String, &T)]) {
    let suffix = if kind == "counter" { "_total" } else { "" };
    for family in families {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "# TYPE {} {kind}", family.name);
        if let Some(unit) = family.unit {
            let _ = writeln!(text, "# UNIT {} {unit}", family.name);
        }
        let _ = writeln!(text, "# HELP {} {}", family.name, family.help);
        for (labels, source) in sources {
            if let Some(value) = (family.value)(source) {
                let _ = writeln!(text, "{}{suffix}{{{labels}}} {value}", family.name);
            }
        }
    }
}

fn container_labels(report: &ShimReport, container: &ContainerReport) -> String {
    let machine = container.machine.pid.to_string();
    to_labels(&[
        ("namespace", &report.namespace),
        ("id", &container.id),
        ("kind", &container.kind),
        ("vmm", &machine),
    ])
}

fn to_labels(labels: &[(&str, &str)]) -> String {
    let labels: Vec<String> = labels
        .iter()
        .map(|(name, value)| {
            let value = value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
            format!("{name}=\"{value}\"")
        })
        .collect();
    labels.join(",")
}

fn to_seconds(milliseconds: u64) -> f64 {
    to_float(milliseconds) / 1e3
}

/// Exact up to 2^53, which is more than any of these values.
#[expect(clippy::cast_precision_loss, reason = "see above")]
fn to_float(value: u64) -> f64 {
    value as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admin::tests::shim;

    #[test]
    fn each_container_has_a_line_in_each_family_that_it_has_a_value_for() {
        let shims = [shim("default", &["a\"b"]), shim("k8s.io", &["c"])];
        let text = to_openmetrics(shims.iter().map(|shim| &shim.report));
        for line in [
            "# TYPE nutshell_machine_boot_seconds gauge",
            "# UNIT nutshell_machine_boot_seconds seconds",
            "nutshell_machine_boot_seconds{namespace=\"default\",id=\"a\\\"b\",kind=\"container\",vmm=\"40\"} 0.124",
            "nutshell_machine_memory_bytes{namespace=\"k8s.io\",id=\"c\",kind=\"container\",vmm=\"40\"} 536870912",
            "nutshell_container_running{namespace=\"k8s.io\",id=\"c\",kind=\"container\",vmm=\"40\"} 1",
            "nutshell_machine_answers{namespace=\"k8s.io\",sandbox=\"c\"} 1",
            "nutshell_machine_kernel_seconds{namespace=\"k8s.io\",sandbox=\"c\"} 0.031",
            "# TYPE nutshell_device_to_guest_bytes counter",
            "# UNIT nutshell_device_to_guest_bytes bytes",
            "nutshell_device_to_guest_bytes_total{namespace=\"k8s.io\",sandbox=\"c\",device=\"nutshell-0\"} 81920",
            "# TYPE nutshell_device_stalls counter",
            "nutshell_device_stalls_total{namespace=\"default\",sandbox=\"a\\\"b\",device=\"nutshell-0\"} 2",
            "nutshell_device_errors_total{namespace=\"default\",sandbox=\"a\\\"b\",device=\"rng\"} 0",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
        }
        // Neither of the containers has started.
        assert!(!text.contains("nutshell_container_start_seconds{"), "{text}");
        assert!(text.ends_with("# EOF\n"));
    }

    #[test]
    fn containers_of_a_pod_have_one_line_for_each_device_of_their_machine() {
        let mut pod = shim("k8s.io", &["sandbox", "member"]);
        for container in &mut pod.report.containers {
            container.machine.sandbox = "sandbox".to_owned();
        }
        let text = to_openmetrics([&pod.report].into_iter());
        let count = |name: &str| text.lines().filter(|line| line.starts_with(name)).count();
        assert_eq!(count("nutshell_device_requests_total{"), 2);
        assert_eq!(count("nutshell_machine_answers{"), 1);
        assert_eq!(count("nutshell_container_running{"), 2);
    }

    #[test]
    fn machine_whose_vmm_gave_no_answer_has_no_counters() {
        let mut shim = shim("default", &["a"]);
        let machine = &mut shim.report.containers[0].machine;
        machine.devices.clear();
        machine.devices_error = Some("no answer".to_owned());
        let text = to_openmetrics([&shim.report].into_iter());
        assert!(
            text.contains("nutshell_machine_answers{namespace=\"default\",sandbox=\"a\"} 0\n"),
            "{text}"
        );
        assert!(!text.contains("_total{"), "{text}");
    }
}
