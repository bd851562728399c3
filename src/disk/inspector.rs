//! The jailed child that reads an image. Its standard input is the image, its standard output gets the answer.

use std::{
    fs::File,
    io::{self, Write},
    os::{fd::AsFd, unix::fs::MetadataExt},
    process::ExitCode,
};

use nutshell_disk_image::{Base, BaseFormat, ReadAt, qcow2::Qcow2};
use rustix::thread::CapabilitySet;

use super::{
    report::{Clusters, Findings, Qcow2Findings},
    system_calls,
};
use crate::jail::{self, Jail, OpenAccess, Root};

/// The first argument that selects this role.
pub(crate) const ROLE: &str = "disk-inspector";

/// The maximum number of descriptors: standard input, output and error, and two duplicates of the image, with a margin.
const MAX_DESCRIPTORS: u32 = 16;

/// What the inspector sends: its findings, or the error because of which it has none.
pub(super) type Answer = Result<Findings, String>;

/// Enters the jail, reads the image and prints the answer as JSON.
pub(crate) fn main() -> ExitCode {
    let confined = jail::enter(&Jail {
        role: ROLE,
        name: c"nutshell-disk",
        root: Root::Empty,
        open_access: OpenAccess::Nothing,
        peer: None,
        capabilities: CapabilitySet::empty(),
        keep: &[],
        max_descriptors: MAX_DESCRIPTORS,
        descriptor_table_size: MAX_DESCRIPTORS,
        max_threads: 1,
        calls: Some(system_calls::PROCESS),
    });
    let answer: Answer = match confined {
        Ok(()) => examine().map_err(|error| error.to_string()),
        Err(error) => Err(error.to_string()),
    };
    let printed = serde_json::to_vec(&answer)
        .map_err(io::Error::from)
        .and_then(|answer| io::stdout().write_all(&answer));
    match printed {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

/// Examines the image on standard input.
fn examine() -> io::Result<Findings> {
    let duplicate = || Ok::<_, io::Error>(File::from(io::stdin().as_fd().try_clone_to_owned()?));
    let file = duplicate()?;
    let mut findings = Findings {
        file_size: file.size()?,
        ..Findings::default()
    };
    match BaseFormat::detect(&file) {
        Ok(format) => findings.format = Some(format.name().to_owned()),
        Err(error) => {
            findings.refusal = Some(error.to_string());
            return Ok(findings);
        }
    }
    match Base::open(Box::new(duplicate()?)) {
        Err(error) => findings.refusal = Some(error.to_string()),
        Ok(Base::Raw { size, .. }) => {
            findings.virtual_size = Some(size);
            let metadata = file.metadata()?;
            // A block device has no holes.
            findings.allocated_bytes = Some(match metadata.is_file() {
                true => (metadata.blocks() * 512).min(size),
                false => size,
            });
        }
        Ok(Base::Qcow2(image)) => examine_qcow2(&image, &mut findings),
    }
    Ok(findings)
}

fn examine_qcow2(image: &Qcow2, findings: &mut Findings) {
    let survey = image.survey();
    findings.virtual_size = Some(image.size());
    let clusters = match survey {
        Ok(survey) => {
            let allocated = (survey.data_clusters + survey.compressed_clusters).saturating_mul(image.cluster_size());
            findings.allocated_bytes = Some(allocated.min(image.size()));
            Some(Clusters {
                data: survey.data_clusters,
                compressed: survey.compressed_clusters,
                zero: survey.zero_clusters,
            })
        }
        Err(error) => {
            findings.damage = Some(error.to_string());
            None
        }
    };
    findings.qcow2 = Some(Qcow2Findings {
        version: image.version(),
        cluster_size: image.cluster_size(),
        compression: image.compression().name().to_owned(),
        clusters,
        snapshots: image.snapshots(),
        features: [
            names(
                image.compatible_features(),
                &["lazy refcounts"],
                "compatible feature bit",
            ),
            names(
                image.autoclear_features(),
                &["bitmaps", "raw external data"],
                "autoclear feature bit",
            ),
        ]
        .concat(),
    });
}

/// The names of the set bits (QEMU, docs/interop/qcow2.txt). A bit without a name is `unknown` and its number.
fn names(bits: u64, known: &[&str], unknown: &str) -> Vec<String> {
    let set = (0..u64::BITS).filter(|bit| bits & 1 << bit != 0);
    set.map(|bit| match known.get(bit as usize) {
        Some(name) => (*name).to_owned(),
        None => format!("{unknown} {bit}"),
    })
    .collect()
}
