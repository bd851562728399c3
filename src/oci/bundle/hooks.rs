//! Hooks of a spec (OCI spec, "POSIX-platform Hooks"): the shim runs the hooks for the runtime's namespaces, on the
//! host. The agent runs the hooks for the container's namespaces, in the guest.

use std::time::Duration;

use oci_spec::runtime::{Hook as SpecHook, Spec};

use crate::oci::{Hook, Hooks, PlanError};

/// Takes the hooks that run on the host out of the spec.
pub(super) fn take_host_hooks(spec: &mut Spec) -> Result<Hooks, PlanError> {
    let Some(mut hooks) = spec.hooks_mut().take() else {
        return Ok(Hooks::default());
    };
    let host = Hooks {
        prestart: parse_hooks("prestart", hooks.prestart_mut().take())?,
        create_runtime: parse_hooks("createRuntime", hooks.create_runtime_mut().take())?,
        poststart: parse_hooks("poststart", hooks.poststart_mut().take())?,
        poststop: parse_hooks("poststop", hooks.poststop_mut().take())?,
    };
    spec.set_hooks(Some(hooks));
    Ok(host)
}

fn parse_hooks(name: &str, hooks: Option<Vec<SpecHook>>) -> Result<Vec<Hook>, PlanError> {
    let parse = |hook: SpecHook| {
        let invalid = |reason: &str| PlanError::invalid(format!("hooks.{name}: {}", hook.path().display()), reason);
        if !hook.path().is_absolute() {
            return Err(invalid("the path must be absolute"));
        }
        let timeout = match hook.timeout().map(u64::try_from) {
            None => None,
            Some(Ok(seconds @ 1..)) => Some(Duration::from_secs(seconds)),
            Some(_) => return Err(invalid("the timeout must be greater than zero")),
        };
        Ok(Hook {
            path: hook.path().clone(),
            arguments: hook.args().clone().unwrap_or_default(),
            environment: hook.env().clone().unwrap_or_default(),
            timeout,
        })
    };
    hooks.unwrap_or_default().into_iter().map(parse).collect()
}
