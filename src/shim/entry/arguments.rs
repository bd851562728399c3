//! The command line, as containerd writes it for shims made with Go's `flag` package (containerd
//! `core/runtime/v2/README.md`, `pkg/shim`), parsed by `containerd-shim` and checked here.

use std::{ffi::OsString, path::PathBuf};

use containerd_shim::Flags;

use crate::oci::{ContainerId, IdError};

/// The environment variable by which `start` names the configuration to the shim, unless that is the default one.
pub(crate) const CONFIGURATION_VARIABLE: &str = "NUTSHELL_CONFIGURATION";

/// What the shim is asked to do.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// `-v`: print the version.
    Version,
    /// `-info`: print what the runtime can do.
    Info,
    /// `start`: make sure that a shim serves, print its address.
    Start(Target),
    /// `delete`: clean up after the container with the bundle that `-bundle` names.
    Delete(Option<PathBuf>),
    /// Nothing named: be that shim.
    Serve(Target, Serve),
}

/// The container that an action is for.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Target {
    /// Its id.
    pub(crate) id: ContainerId,
    /// Its namespace.
    pub(crate) namespace: String,
    /// containerd's gRPC address.
    pub(crate) address: String,
    /// containerd's executable.
    pub(crate) publish_binary: Option<PathBuf>,
    /// Log debug messages.
    pub(crate) debug: bool,
}

/// What `start` tells the shim that it starts.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Serve {
    /// The path of the socket that is passed.
    pub(crate) socket: PathBuf,
}

/// Why a command line is rejected.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ArgumentsError {
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
        "start" => Ok(Action::Start(target(flags)?)),
        "delete" => Ok(Action::Delete(path(flags.bundle))),
        "" => {
            let socket = path(flags.socket.clone()).ok_or(ArgumentsError::Missing("socket"));
            Ok(Action::Serve(target(flags)?, Serve { socket: socket? }))
        }
        other => Err(ArgumentsError::UnknownAction(other.to_owned())),
    }
}

fn target(flags: Flags) -> Result<Target, ArgumentsError> {
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
        publish_binary: path(flags.publish_binary),
        debug: flags.debug,
    })
}

/// An empty path is no path.
fn path(text: String) -> Option<PathBuf> {
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
    fn start_is_parsed_however_the_flags_are_written() {
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
    fn delete_has_a_bundle_and_serve_a_socket() {
        let line = format!("{CONTAINERD} -bundle /run/b delete");
        assert_eq!(parsed(&line), Ok(Action::Delete(Some("/run/b".into()))));
        assert_eq!(parsed(&format!("{CONTAINERD} delete")), Ok(Action::Delete(None)));
        let serve = Serve {
            socket: "/run/s/1".into(),
        };
        let line = format!("{CONTAINERD} -socket /run/s/1");
        assert_eq!(parsed(&line), Ok(Action::Serve(target(), serve)));
    }

    #[test]
    fn information_needs_nothing_else() {
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
    fn what_cannot_be_meant_is_an_error_that_names_it() {
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
