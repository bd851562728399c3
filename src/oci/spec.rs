//! Reading a bundle's `config.json`, which containerd writes and only its side of the host may.

use std::{
    collections::HashMap,
    fs::File,
    io::{self, Read},
    path::Path,
};

use serde::{Deserialize, de::DeserializeOwned};

use super::PlanError;

/// The largest `config.json`, in bytes: what fits a message to the agent.
const LIMIT: u64 = nutshell_protocol::MAX_FRAME as u64;

/// The annotations of a bundle's spec, or none where there is no `config.json`: with
/// `sandboxer = "shim"` containerd makes a sandbox's bundle without one (containerd
/// `plugins/sandbox/controller.go`).
///
/// # Errors
///
/// If there is a `config.json` that cannot be read.
pub(crate) fn read_annotations(bundle: &Path) -> Result<HashMap<String, String>, PlanError> {
    #[derive(Deserialize)]
    struct Annotated {
        annotations: Option<HashMap<String, String>>,
    }
    match read::<Annotated>(bundle) {
        Ok(spec) => Ok(spec.annotations.unwrap_or_default()),
        Err(PlanError::Unreadable { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(HashMap::new()),
        Err(error) => Err(error),
    }
}

pub(super) fn read<T: DeserializeOwned>(bundle: &Path) -> Result<T, PlanError> {
    let path = bundle.join("config.json");
    let mut bytes = Vec::new();
    if let Err(source) = File::open(&path).and_then(|file| file.take(LIMIT + 1).read_to_end(&mut bytes)) {
        return Err(PlanError::Unreadable { path, source });
    }
    if bytes.len() as u64 > LIMIT {
        return Err(PlanError::TooLarge { path, limit: LIMIT });
    }
    serde_json::from_slice(&bytes).map_err(|source| PlanError::Malformed { path, source })
}

#[cfg(test)]
mod tests {
    use oci_spec::runtime::Spec;

    use super::*;

    #[test]
    fn annotations_are_read_without_a_whole_spec_and_absence_is_no_error() {
        let bundle = tempfile::tempdir().unwrap();
        assert_eq!(read_annotations(bundle.path()).unwrap(), HashMap::new());
        let config = bundle.path().join("config.json");
        std::fs::write(&config, r#"{"mounts": [], "annotations": {"a": "b"}}"#).unwrap();
        assert_eq!(read_annotations(bundle.path()).unwrap()["a"], "b");
        std::fs::write(&config, r#"{"annotations": null}"#).unwrap();
        assert_eq!(read_annotations(bundle.path()).unwrap(), HashMap::new());
    }

    #[test]
    fn unreadable_spec_is_an_error_that_names_the_file() {
        let bundle = tempfile::tempdir().unwrap();
        let config = bundle.path().join("config.json");
        assert!(matches!(read::<Spec>(bundle.path()), Err(PlanError::Unreadable { .. })));
        std::fs::write(&config, "{").unwrap();
        let error = read_annotations(bundle.path()).unwrap_err();
        assert!(error.to_string().contains("config.json"), "{error}");
        let huge = format!(
            "{{\"ociVersion\": \"{}\"}}",
            " ".repeat(usize::try_from(LIMIT).unwrap())
        );
        std::fs::write(&config, huge).unwrap();
        assert!(matches!(read::<Spec>(bundle.path()), Err(PlanError::TooLarge { .. })));
    }
}
