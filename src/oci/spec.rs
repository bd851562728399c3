//! Reads a bundle's `config.json`. The host writes that file; a guest cannot.

use std::{
    fs::File,
    io::Read,
    path::{Path, PathBuf},
};

use serde::de::DeserializeOwned;

use super::PlanError;

/// The largest `config.json` that is read, in bytes: a larger one would not fit into a message to the agent.
const MAX_SIZE: u64 = nutshell_protocol::MAX_TO_AGENT as u64;

pub(super) fn read<T: DeserializeOwned>(bundle: &Path) -> Result<T, PlanError> {
    let path = bundle.join("config.json");
    let mut bytes = Vec::new();
    if let Err(source) = File::open(&path).and_then(|file| file.take(MAX_SIZE + 1).read_to_end(&mut bytes)) {
        return Err(PlanError::Unreadable { path, source });
    }
    if bytes.len() as u64 > MAX_SIZE {
        return Err(PlanError::TooLarge { path, limit: MAX_SIZE });
    }
    parse(path, &bytes)
}

/// Parses the bytes of the file at `path`.
pub(super) fn parse<T: DeserializeOwned>(path: PathBuf, bytes: &[u8]) -> Result<T, PlanError> {
    serde_json::from_slice(bytes).map_err(|source| PlanError::Malformed { path, source })
}

#[cfg(test)]
mod tests {
    use oci_spec::runtime::Spec;

    use super::*;

    #[test]
    fn missing_spec_is_an_error() {
        let bundle = tempfile::tempdir().unwrap();
        assert!(matches!(read::<Spec>(bundle.path()), Err(PlanError::Unreadable { .. })));
    }

    #[test]
    fn spec_above_the_maximum_size_is_an_error() {
        let bundle = tempfile::tempdir().unwrap();
        let padding = " ".repeat(usize::try_from(MAX_SIZE).unwrap());
        let spec = format!("{{\"ociVersion\": \"{padding}\"}}");
        std::fs::write(bundle.path().join("config.json"), spec).unwrap();
        assert!(matches!(read::<Spec>(bundle.path()), Err(PlanError::TooLarge { .. })));
    }
}
