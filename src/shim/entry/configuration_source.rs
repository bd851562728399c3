//! The choice of a shim's configuration.

use std::{
    fs,
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use super::options::Options;
use crate::shim::configuration::{Configuration, ConfigurationError};

/// Where a user sets the path of the configuration.
const CONFIG_PATH_SOURCE: &str = "the path is set by ConfigPath in this runtime's options in containerd's \
    configuration, or by ctr's --runtime-config-path";

/// A configuration that cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConfigurationSourceError {
    /// The path is relative, and the working directory is the bundle.
    #[error("configuration {}: the path must be absolute: {CONFIG_PATH_SOURCE}", .0.display())]
    RelativePath(PathBuf),
    /// The file that the options name cannot be read.
    #[error("{0}: {CONFIG_PATH_SOURCE}: make the file readable, or set no path")]
    Unreadable(#[source] ConfigurationError),
    /// The options section of containerd's configuration is not a valid configuration. containerd passes on a section
    /// without ConfigPath unchanged, even one that was copied from runc's.
    #[error(
        "the options of this runtime in containerd's configuration: {0}: the section takes ConfigPath or the keys of \
         /etc/nutshell/config.toml, not runc's options"
    )]
    OptionsSection(String),
    /// The contents of the file are invalid.
    #[error(transparent)]
    Configuration(#[from] ConfigurationError),
    /// The options section cannot be stored in the bundle.
    #[error("cannot write {}: {source}", path.display())]
    Unwritable {
        /// The file to which the section was to be written.
        path: PathBuf,
        /// The error of the operating system.
        source: io::Error,
    },
}

/// Selects the configuration that `options` name, and returns its path, or `None` for the default one. An inline
/// configuration is written to `nutshell.toml` in `bundle`.
///
/// # Errors
///
/// The configuration is invalid. It is checked here because an error of `start` reaches the user.
pub(super) fn select_configuration(
    options: &Options,
    bundle: &Path,
) -> Result<Option<PathBuf>, ConfigurationSourceError> {
    match options {
        Options {
            config_path: Some(path),
            ..
        } if path.is_relative() => Err(ConfigurationSourceError::RelativePath(path.clone())),
        Options {
            config_path: Some(path),
            ..
        } => {
            Configuration::load(Some(path)).map_err(|error| match error {
                ConfigurationError::Unreadable { .. } => ConfigurationSourceError::Unreadable(error),
                ConfigurationError::Malformed { .. } => error.into(),
            })?;
            Ok(Some(path.clone()))
        }
        Options {
            config_body: Some(body),
            ..
        } => {
            let path = bundle.join("nutshell.toml");
            write_private(&path, body).map_err(|source| ConfigurationSourceError::Unwritable {
                path: path.clone(),
                source,
            })?;
            Configuration::load(Some(&path)).map_err(|error| match error {
                ConfigurationError::Malformed { reason, .. } => ConfigurationSourceError::OptionsSection(reason),
                ConfigurationError::Unreadable { .. } => error.into(),
            })?;
            Ok(Some(path))
        }
        Options { .. } => {
            Configuration::load(None)?;
            Ok(None)
        }
    }
}

/// Writes a file that only root can read.
fn write_private(path: &Path, text: &str) -> io::Result<()> {
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)?;
    file.write_all(text.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn configuration_comes_from_the_path_or_the_text_in_the_options() {
        let bundle = tempfile::tempdir().unwrap();
        let body = |text: &str| Options {
            config_body: Some(text.to_owned()),
            ..Options::default()
        };
        let path = select_configuration(&body("debug = true"), bundle.path())
            .unwrap()
            .unwrap();
        assert!(Configuration::load(Some(&path)).unwrap().debug);
        for named in ["relative.toml", "/no/such.toml"] {
            let options = Options {
                config_path: Some(named.into()),
                ..Options::default()
            };
            let error = select_configuration(&options, bundle.path()).unwrap_err().to_string();
            assert!(error.contains(named), "{error}");
            assert!(error.contains("ConfigPath"), "{error}");
        }
    }

    #[test]
    fn options_section_copied_from_runcs_is_an_error_that_names_the_section() {
        let bundle = tempfile::tempdir().unwrap();
        // The form in which the CRI passes on a section that was copied from runc's.
        let options = Options {
            config_body: Some("BinaryName = \"\"\nSystemdCgroup = true\n".to_owned()),
            ..Options::default()
        };
        let error = select_configuration(&options, bundle.path()).unwrap_err().to_string();
        for named in [
            "BinaryName",
            "options of this runtime in containerd's configuration",
            "runc",
        ] {
            assert!(error.contains(named), "{error}");
        }
        assert!(!error.contains('\n'), "{error}");
    }
}
