//! The process of an exec that the QEMU guest agent runs in a virtual machine.

use serde::Deserialize;

use crate::oci::PlanError;

/// The settings of an OCI `Process` that the QEMU guest agent can apply. Capabilities, limits and security labels are
/// those of the agent.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(crate) struct GuestProcess {
    /// The program and its arguments, at least the program.
    pub(crate) args: Vec<String>,
    /// The whole environment, as `NAME=value`.
    pub(crate) env: Option<Vec<String>>,
    /// The working directory.
    #[serde(default = "root_directory")]
    pub(crate) cwd: String,
    #[serde(default)]
    user: User,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
struct User {
    #[serde(default)]
    uid: u32,
    #[serde(default)]
    gid: u32,
}

fn root_directory() -> String {
    "/".to_owned()
}

impl GuestProcess {
    /// Parses an OCI `Process` as JSON.
    ///
    /// # Errors
    ///
    /// It is malformed, has no program, or is to run as a user other than root.
    pub(crate) fn parse(spec: &[u8]) -> Result<Self, PlanError> {
        let process: Self =
            serde_json::from_slice(spec).map_err(|error| PlanError::invalid("process", error.to_string()))?;
        if process.args.first().is_none_or(String::is_empty) {
            return Err(PlanError::Missing("process.args"));
        }
        let User { uid, gid } = process.user;
        if (uid, gid) != (0, 0) {
            return Err(PlanError::unsupported(
                format!("process.user: {uid}:{gid}"),
                "the guest agent of a virtual machine starts processes as root. Run su or sudo in the guest for another \
                 user",
            ));
        }
        Ok(process)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn parse(spec: &serde_json::Value) -> Result<GuestProcess, String> {
        GuestProcess::parse(spec.to_string().as_bytes()).map_err(|error| error.to_string())
    }

    #[test]
    fn program_environment_and_directory_are_taken() {
        let spec = json!({"args": ["ls", "-l"], "env": ["A=b"], "cwd": "/srv", "user": {"uid": 0, "gid": 0},
            "capabilities": {"bounding": []}, "terminal": false});
        let expected = GuestProcess {
            args: vec!["ls".to_owned(), "-l".to_owned()],
            env: Some(vec!["A=b".to_owned()]),
            cwd: "/srv".to_owned(),
            user: User::default(),
        };
        assert_eq!(parse(&spec).unwrap(), expected);
        assert_eq!(parse(&json!({"args": ["ls"]})).unwrap().cwd, "/");
    }

    #[test]
    fn missing_program_and_other_users_are_refused() {
        for (spec, expected) in [
            (json!({"args": []}), "process.args is missing"),
            (json!({"args": [""]}), "process.args is missing"),
            (json!({"cwd": "/"}), "process: missing field `args`"),
            (
                json!({"args": ["id"], "user": {"uid": 1000}}),
                "process.user: 1000:0: the guest agent",
            ),
            (
                json!({"args": ["id"], "user": {"gid": 5}}),
                "process.user: 0:5: the guest agent",
            ),
        ] {
            let error = parse(&spec).unwrap_err();
            assert!(error.starts_with(expected), "{error}");
        }
    }
}
