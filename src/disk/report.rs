//! The report on an image.

use std::fmt::Write;

use serde::{Deserialize, Serialize};

/// The report, as `--json` prints it.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    pub(super) file: String,
    #[serde(flatten)]
    pub(super) findings: Findings,
}

/// What the inspector found. Sizes are in bytes.
#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Findings {
    /// `None` for a format that is not supported.
    pub(super) format: Option<String>,
    pub(super) file_size: u64,
    pub(super) virtual_size: Option<u64>,
    /// The part of the disk that has data in the file.
    pub(super) allocated_bytes: Option<u64>,
    pub(super) qcow2: Option<Qcow2Findings>,
    /// Why a vmm refuses the image.
    pub(super) refusal: Option<String>,
    /// Why a guest gets an I/O error for a part of the disk.
    pub(super) damage: Option<String>,
}

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Qcow2Findings {
    pub(super) version: u32,
    pub(super) cluster_size: u64,
    /// The format of compressed clusters, if there are any.
    pub(super) compression: String,
    /// `None` if a table cannot be read.
    pub(super) clusters: Option<Clusters>,
    /// The number of snapshots, which are ignored.
    pub(super) snapshots: u32,
    pub(super) features: Vec<String>,
}

/// Numbers of clusters of the disk.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Clusters {
    pub(super) data: u64,
    pub(super) compressed: u64,
    pub(super) zero: u64,
}

impl Findings {
    pub(super) fn is_usable(&self) -> bool {
        self.refusal.is_none() && self.damage.is_none()
    }
}

impl Report {
    /// One property in a line.
    pub(super) fn to_text(&self) -> String {
        let Findings {
            format,
            file_size,
            virtual_size,
            allocated_bytes,
            qcow2,
            refusal,
            damage,
        } = &self.findings;
        let format = match (format, qcow2) {
            (Some(format), Some(qcow2)) => format!("{format}, version {}", qcow2.version),
            (Some(format), None) => format.clone(),
            (None, _) => "not supported".to_owned(),
        };
        let mut lines = vec![
            ("file", self.file.clone()),
            ("format", format),
            ("file size", bytes(*file_size)),
        ];
        lines.extend(virtual_size.map(|size| ("virtual size", bytes(size))));
        lines.extend(allocated_bytes.map(|size| ("allocated", bytes(size))));
        if let Some(qcow2) = qcow2 {
            lines.push(("cluster size", bytes(qcow2.cluster_size)));
            if let Some(clusters) = &qcow2.clusters {
                let Clusters { data, compressed, zero } = clusters;
                let text = format!(
                    "{data} data, {compressed} compressed ({}), {zero} zero",
                    qcow2.compression
                );
                lines.push(("clusters", text));
            }
            lines.push(("snapshots", format!("{}, ignored", qcow2.snapshots)));
            lines.push(("features", qcow2.features.join(", ")));
        }
        let verdict = match (refusal, damage) {
            (Some(refusal), _) => ("refused", refusal.clone()),
            (None, Some(damage)) => ("damaged", format!("the guest gets I/O errors: {damage}")),
            (None, None) => (
                "usable",
                "as a base image; a disk that a guest can write is always raw".to_owned(),
            ),
        };
        lines.push(verdict);
        let mut text = String::new();
        for (name, value) in lines {
            // Writing to a string cannot fail.
            let _ = writeln!(
                text,
                "{}",
                format!("{:<14}{}", format!("{name}:"), printable(&value)).trim_end()
            );
        }
        text
    }
}

/// The text without control characters, which could change the terminal: the inspector reads hostile images.
pub(super) fn printable(text: &str) -> String {
    text.replace(char::is_control, "?")
}

fn bytes(size: u64) -> String {
    let units = [(1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")];
    match units.into_iter().find(|(unit, _)| size >= *unit) {
        // Tenths, rounded down.
        Some((unit, name)) => format!("{size} bytes ({}.{} {name})", size / unit, size % unit * 10 / unit),
        None => format!("{size} bytes"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn report_has_a_property_in_a_line_and_ends_with_the_verdict() {
        let usable = Report {
            file: "/images/debian.qcow2".to_owned(),
            findings: Findings {
                format: Some("qcow2".to_owned()),
                file_size: 300_000_000,
                virtual_size: Some(3 << 30),
                allocated_bytes: Some(1_610_612_736),
                qcow2: Some(Qcow2Findings {
                    version: 3,
                    cluster_size: 65536,
                    compression: "zlib".to_owned(),
                    clusters: Some(Clusters {
                        data: 1,
                        compressed: 24575,
                        zero: 24576,
                    }),
                    snapshots: 0,
                    features: Vec::new(),
                }),
                ..Findings::default()
            },
        };
        assert_eq!(
            usable.to_text(),
            "file:         /images/debian.qcow2\n\
             format:       qcow2, version 3\n\
             file size:    300000000 bytes (286.1 MiB)\n\
             virtual size: 3221225472 bytes (3.0 GiB)\n\
             allocated:    1610612736 bytes (1.5 GiB)\n\
             cluster size: 65536 bytes (64.0 KiB)\n\
             clusters:     1 data, 24575 compressed (zlib), 24576 zero\n\
             snapshots:    0, ignored\n\
             features:\n\
             usable:       as a base image; a disk that a guest can write is always raw\n"
        );
        let refused = Report {
            file: "x".to_owned(),
            findings: Findings {
                file_size: 100,
                refusal: Some("no \x1b[31m image".to_owned()),
                ..Findings::default()
            },
        };
        assert_eq!(
            refused.to_text(),
            "file:         x\n\
             format:       not supported\n\
             file size:    100 bytes\n\
             refused:      no ?[31m image\n"
        );
    }

    #[test]
    fn json_has_the_file_and_all_findings() {
        let report = Report {
            file: "x".to_owned(),
            findings: Findings {
                format: Some("raw".to_owned()),
                file_size: 512,
                virtual_size: Some(512),
                allocated_bytes: Some(0),
                ..Findings::default()
            },
        };
        assert_eq!(
            serde_json::to_value(&report).unwrap(),
            serde_json::json!({
                "file": "x",
                "format": "raw",
                "file_size": 512,
                "virtual_size": 512,
                "allocated_bytes": 0,
                "qcow2": null,
                "refusal": null,
                "damage": null,
            })
        );
    }
}
