//! Annotations of a bundle and the numbers in them.

use std::{collections::HashMap, io, path::Path, str::FromStr};

use serde::Deserialize;

use super::{PlanError, spec};

/// Reads the annotations of a bundle's spec. A bundle without `config.json` has none: with `sandboxer = "shim"`,
/// containerd creates a sandbox's bundle without that file (containerd `plugins/sandbox/controller.go`).
///
/// # Errors
///
/// There is a `config.json`, and it cannot be read or parsed.
pub(crate) fn read_annotations(bundle: &Path) -> Result<HashMap<String, String>, PlanError> {
    #[derive(Deserialize)]
    struct Annotated {
        annotations: Option<HashMap<String, String>>,
    }
    match spec::read::<Annotated>(bundle) {
        Ok(spec) => Ok(spec.annotations.unwrap_or_default()),
        Err(PlanError::Unreadable { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(HashMap::new()),
        Err(error) => Err(error),
    }
}

/// The number in the annotation `name`, `None` if there is no such annotation.
pub(super) fn parse_number<T: FromStr>(
    annotations: &HashMap<String, String>,
    name: &str,
) -> Result<Option<T>, PlanError> {
    let Some(text) = annotations.get(name) else {
        return Ok(None);
    };
    match text.parse() {
        Ok(number) => Ok(Some(number)),
        Err(_) => Err(PlanError::invalid(
            format!("annotation {name}"),
            format!("{text:?} is not a valid number"),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn annotations_are_read_without_a_complete_spec() {
        let bundle = tempfile::tempdir().unwrap();
        let config = bundle.path().join("config.json");

        std::fs::write(&config, r#"{"mounts": [], "annotations": {"a": "b"}}"#).unwrap();
        assert_eq!(read_annotations(bundle.path()).unwrap()["a"], "b");

        std::fs::write(&config, r#"{"annotations": null}"#).unwrap();
        assert_eq!(read_annotations(bundle.path()).unwrap(), HashMap::new());
    }

    #[test]
    fn bundle_without_a_spec_has_no_annotations() {
        let bundle = tempfile::tempdir().unwrap();
        assert_eq!(read_annotations(bundle.path()).unwrap(), HashMap::new());
    }

    #[test]
    fn malformed_spec_is_an_error_that_names_the_file() {
        let bundle = tempfile::tempdir().unwrap();
        std::fs::write(bundle.path().join("config.json"), "{").unwrap();
        let error = read_annotations(bundle.path()).unwrap_err();
        assert!(error.to_string().contains("config.json"), "{error}");
    }
}
