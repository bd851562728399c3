//! The command line: flags of Go's `flag` package, then the action (containerd `core/runtime/v2/README.md`,
//! `pkg/shim`). `containerd-shim` parses it, and this module checks it.

use std::{ffi::OsString, path::PathBuf};

use containerd_shim::Flags;

use crate::oci::{ContainerId, IdError};

/// The environment variable with which `start` passes the path of the configuration to the shim process. Unset
/// for the default configuration.
pub(crate) const CONFIGURATION_VARIABLE: &str = "NUTSHELL_CONFIGURATION";

/// An action of the shim.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// `-v`: print the version.
    Version,
    /// `-info`: print the features of the runtime.
    Info,
    /// `start`: start a shim unless one serves the container's group, and print its address.
    Start(Target),
    /// `delete`: clean up after the container with this bundle (`-bundle`).
    Delete(Option<PathBuf>),
    /// No action: run as the shim, which listens on the socket at this path.
    Serve(Target, PathBuf),
}

/// The container of an action, and the containerd that manages it.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Target {
    pub(crate) id: ContainerId,
    /// The containerd namespace of the container.
    pub(crate) namespace: String,
    /// The path of containerd's gRPC socket.
    pub(crate) address: String,
    /// The path of containerd's executable.
    pub(crate) publish_binary: Option<PathBuf>,
    /// Log debug messages.
    pub(crate) debug: bool,
}

/// A command line that is rejected.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ArgumentsError {
    /// `containerd-shim` cannot parse the flags.
    #[error("{source}: in the arguments {arguments:?}")]
    Flags {
        arguments: Vec<OsString>,
        source: containerd_shim::Error,
    },
    #[error("-{0} is required")]
    Missing(&'static str),
    #[error("unknown action {0:?}: use start, delete or none")]
    UnknownAction(String),
    #[error("-id: {0}")]
    Id(#[from] IdError),
}

/// Parses the arguments after the program's name.
pub(crate) fn parse(arguments: impl Iterator<Item = OsString>) -> Result<Action, ArgumentsError> {
    let arguments: Vec<_> = arguments.collect();
    let flags = match containerd_shim::parse(&arguments) {
        Ok(flags) => flags,
        Err(source) => return Err(ArgumentsError::Flags { arguments, source }),
    };
    if flags.version {
        return Ok(Action::Version);
    }
    if flags.info {
        return Ok(Action::Info);
    }
    match flags.action.as_str() {
        "start" => Ok(Action::Start(to_target(flags)?)),
        "delete" => Ok(Action::Delete(to_path(flags.bundle))),
        "" => {
            let socket = to_path(flags.socket.clone()).ok_or(ArgumentsError::Missing("socket"));
            Ok(Action::Serve(to_target(flags)?, socket?))
        }
        other => Err(ArgumentsError::UnknownAction(other.to_owned())),
    }
}

fn to_target(flags: Flags) -> Result<Target, ArgumentsError> {
    if flags.namespace.is_empty() {
        return Err(ArgumentsError::Missing("namespace"));
    }
    if flags.id.is_empty() {
        return Err(ArgumentsError::Missing("id"));
    }
    Ok(Target {
        id: flags.id.parse()?,
        namespace: flags.namespace,
        address: flags.address,
        publish_binary: to_path(flags.publish_binary),
        debug: flags.debug,
    })
}

/// `None` for an empty text, which means that the flag is not set.
fn to_path(text: String) -> Option<PathBuf> {
    (!text.is_empty()).then(|| PathBuf::from(text))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &str) -> Result<Action, String> {
        parse(line.split_whitespace().map(OsString::from)).map_err(|error| error.to_string())
    }

    fn target() -> Target {
        Target {
            id: "c1".parse().unwrap(),
            namespace: "default".to_owned(),
            address: "/run/containerd/containerd.sock".to_owned(),
            publish_binary: Some("/usr/bin/containerd".into()),
            debug: false,
        }
    }

    const CONTAINERD: &str =
        "-namespace default -address /run/containerd/containerd.sock -publish-binary /usr/bin/containerd -id c1";

    #[test]
    fn start_is_parsed_in_every_flag_notation() {
        for line in [
            format!("{CONTAINERD} start"),
            format!("{CONTAINERD} -debug=false start"),
            CONTAINERD.replace('-', "--").replace("publish--binary", "publish-binary") + " start",
            "--namespace=default -address=/run/containerd/containerd.sock -id=c1 --publish-binary=/usr/bin/containerd start"
                .to_owned(),
            format!("{CONTAINERD} -- start"),
            format!("{CONTAINERD} start ignored"),
        ] {
            assert_eq!(parsed(&line), Ok(Action::Start(target())), "{line}");
        }
        let debug = Target {
            debug: true,
            ..target()
        };
        assert_eq!(parsed(&format!("{CONTAINERD} -debug start")), Ok(Action::Start(debug)));
    }

    #[test]
    fn delete_takes_a_bundle_and_the_shim_a_socket() {
        let line = format!("{CONTAINERD} -bundle /run/b delete");
        assert_eq!(parsed(&line), Ok(Action::Delete(Some("/run/b".into()))));
        assert_eq!(parsed(&format!("{CONTAINERD} delete")), Ok(Action::Delete(None)));
        let line = format!("{CONTAINERD} -socket /run/s/1");
        assert_eq!(parsed(&line), Ok(Action::Serve(target(), "/run/s/1".into())));
    }

    #[test]
    fn version_and_info_need_no_other_flag() {
        for (line, action) in [
            ("-v", Action::Version),
            ("--version", Action::Version),
            ("-info", Action::Info),
            ("-debug -info", Action::Info),
        ] {
            assert_eq!(parsed(line), Ok(action));
        }
    }

    #[test]
    fn invalid_argument_is_an_error_that_names_it() {
        for (line, named) in [
            ("-namespace n -id c1 -colour red start", "-colour"),
            ("-namespace n -id", "-id"),
            ("-namespace n -id c1 -debug=maybe start", "maybe"),
            ("-id c1 start", "-namespace"),
            ("-namespace n start", "-id"),
            ("-namespace n -id ../c1 start", "../c1"),
            ("-namespace n -id c1 restart", "restart"),
            ("-namespace n -id c1", "-socket"),
        ] {
            let error = parsed(line).unwrap_err();
            assert!(error.contains(named), "{line}: {error}");
        }
    }
}
