//! The reports as OpenMetrics text (OpenMetrics 1.0, "Text Format"), for the node exporter's textfile collector or a
//! scraper of its own.

use std::fmt::Write;

use crate::shim::report::{ContainerReport, ShimReport};

/// A family of gauges: its name, what it means, and the value of a container if it has one.
struct Family {
    name: &'static str,
    unit: Option<&'static str>,
    help: &'static str,
    value: fn(&ContainerReport) -> Option<f64>,
}

const FAMILIES: [Family; 7] = [
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
        help: "How long the creation of the container took.",
        value: |container| container.create_milliseconds.map(to_seconds),
    },
    Family {
        name: "nutshell_container_start_seconds",
        unit: Some("seconds"),
        help: "How long the start of the container took.",
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

/// All metrics of these shims.
pub(super) fn to_openmetrics<'a>(reports: impl Iterator<Item = &'a ShimReport> + Clone) -> String {
    let mut text = String::new();
    for family in &FAMILIES {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "# TYPE {} gauge", family.name);
        if let Some(unit) = family.unit {
            let _ = writeln!(text, "# UNIT {} {unit}", family.name);
        }
        let _ = writeln!(text, "# HELP {} {}", family.name, family.help);
        for report in reports.clone() {
            for container in &report.containers {
                if let Some(value) = (family.value)(container) {
                    let labels = labels(report, container);
                    let _ = writeln!(text, "{}{{{labels}}} {value}", family.name);
                }
            }
        }
    }
    text.push_str("# EOF\n");
    text
}

fn labels(report: &ShimReport, container: &ContainerReport) -> String {
    let machine = container.machine.pid.to_string();
    let labels = [
        ("namespace", report.namespace.as_str()),
        ("id", &container.id),
        ("kind", &container.kind),
        ("vmm", &machine),
    ];
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
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
        }
        // Neither has started.
        assert!(!text.contains("nutshell_container_start_seconds{"), "{text}");
        assert!(text.ends_with("# EOF\n"));
    }
}
