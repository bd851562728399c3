//! Translates a list to a seccomp filter.

use std::collections::BTreeMap;

use libc::sock_filter;
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

use super::{AllowedCall, Arguments, Call, CallList, Refusal};

/// Why a list cannot be translated. Only a mistake in a list causes it.
#[derive(Debug, thiserror::Error)]
#[error("cannot translate the list of system calls of thread {thread:?} (a bug in this executable): {source}")]
pub(crate) struct FilterError {
    thread: &'static str,
    source: BackendError,
}

/// With which arguments a call is allowed.
enum Allowed {
    Always,
    If(Vec<SeccompRule>),
}

/// Translates `list`. A call that is not on it raises SIGSYS (`SECCOMP_RET_TRAP`).
pub(crate) fn compile(list: &CallList) -> Result<Vec<sock_filter>, FilterError> {
    let failed = |source| FilterError {
        thread: list.thread,
        source,
    };
    let mut allowed = BTreeMap::new();
    for AllowedCall { call, .. } in list.calls() {
        let rules = rules(call).map_err(failed)?;
        match (allowed.entry(call.number).or_insert(Allowed::If(Vec::new())), rules) {
            (Allowed::Always, _) => {}
            (place, None) => *place = Allowed::Always,
            (Allowed::If(all), Some(rules)) => all.extend(rules),
        }
    }
    // seccompiler always allows a call that has no rules.
    let rules = allowed.into_iter().map(|(number, allowed)| match allowed {
        Allowed::Always => (number, Vec::new()),
        Allowed::If(rules) => (number, rules),
    });
    let filter = SeccompFilter::new(
        rules.collect(),
        SeccompAction::Trap,
        SeccompAction::Allow,
        TargetArch::x86_64,
    );
    let program: BpfProgram = filter.and_then(TryInto::try_into).map_err(failed)?;
    let refusals = refuse(list.refused);
    let program = program.into_iter().map(|instruction| sock_filter {
        code: instruction.code,
        jt: instruction.jt,
        jf: instruction.jf,
        k: instruction.k,
    });
    Ok(refusals.into_iter().chain(program).collect())
}

/// The rules for the arguments of `call`. `None` if any are allowed.
fn rules(call: &Call) -> Result<Option<Vec<SeccompRule>>, BackendError> {
    let rule = |index, operator, value: u32| {
        let condition = SeccompCondition::new(index, SeccompCmpArgLen::Dword, operator, value.into())?;
        SeccompRule::new(vec![condition])
    };
    let rules = match call.arguments {
        Arguments::Any => return Ok(None),
        Arguments::OneOf(index, values) => values
            .iter()
            .map(|value| rule(index, SeccompCmpOp::Eq, *value))
            .collect::<Result<_, _>>()?,
        Arguments::Without(index, bits) => vec![rule(index, SeccompCmpOp::MaskedEq(bits.into()), 0)?],
    };
    Ok(Some(rules))
}

/// The code of an instruction has 16 bits.
const fn lower_half(code: u32) -> u16 {
    (code & 0xffff) as u16
}

/// Instructions that make calls fail. They precede the program of seccompiler, which has one action for all calls that
/// it does not allow. They do not check the architecture: a call of another architecture that has one of these numbers
/// fails too, and the program of seccompiler ends the process at any other.
fn refuse(calls: &[Refusal]) -> Vec<sock_filter> {
    const LOAD_NUMBER: u16 = lower_half(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS);
    const JUMP_IF_EQUAL: u16 = lower_half(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K);
    const RETURN: u16 = lower_half(libc::BPF_RET | libc::BPF_K);
    let instruction = |code, jf, k| sock_filter { code, jt: 0, jf, k };
    // The number is the first field of `struct seccomp_data`.
    let mut program = vec![instruction(LOAD_NUMBER, 0, 0)];
    for call in calls {
        let number = u32::try_from(call.number).unwrap_or(u32::MAX);
        let action = libc::SECCOMP_RET_ERRNO | call.errno.unsigned_abs();
        program.push(instruction(JUMP_IF_EQUAL, 1, number));
        program.push(instruction(RETURN, 0, action));
    }
    program
}
