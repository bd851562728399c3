//! Translates a list to a seccomp filter.

use std::collections::BTreeMap;

use libc::sock_filter;
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

use super::{Arguments, CallList, Refusal};

/// Why a list cannot be translated. Only a mistake in a list causes it.
#[derive(Debug, thiserror::Error)]
#[error("cannot translate the list of system calls of thread {thread:?} (a bug in this executable): {source}")]
pub(crate) struct FilterError {
    thread: &'static str,
    source: BackendError,
}

/// With which arguments each call of a list is allowed, each once. A process translates its list at its start, so this
/// compares only the arguments of the same call.
type ArgumentsByCall = BTreeMap<libc::c_long, Vec<&'static Arguments>>;

fn add_arguments(list: &CallList, by_call: &mut ArgumentsByCall) {
    for call in list.own.iter().copied().flatten() {
        let known = by_call.entry(call.number).or_default();
        if !known.contains(&&call.arguments) {
            known.push(&call.arguments);
        }
    }
    for started in list.starts {
        add_arguments(started, by_call);
    }
}

/// Translates `list`. A call that is not on it raises SIGSYS (`SECCOMP_RET_TRAP`).
pub(crate) fn compile(list: &CallList) -> Result<Vec<sock_filter>, FilterError> {
    let failed = |source| FilterError {
        thread: list.thread,
        source,
    };
    let mut by_call = ArgumentsByCall::new();
    add_arguments(list, &mut by_call);
    let rules = by_call.into_iter().map(|(number, arguments)| {
        // seccompiler always allows a call that has no rules.
        let any = arguments.contains(&&Arguments::Any);
        let rules = if any { Ok(Vec::new()) } else { rules(&arguments) };
        Ok((number, rules?))
    });
    let filter = SeccompFilter::new(
        rules.collect::<Result<_, _>>().map_err(failed)?,
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

/// One rule for each value or set of bits that is allowed.
fn rules(arguments: &[&Arguments]) -> Result<Vec<SeccompRule>, BackendError> {
    let rule = |index, operator, value: u32| {
        let condition = SeccompCondition::new(index, SeccompCmpArgLen::Dword, operator, value.into())?;
        SeccompRule::new(vec![condition])
    };
    let mut rules = Vec::new();
    for arguments in arguments {
        match **arguments {
            // No rule: the caller allows the call with any arguments.
            Arguments::Any => {}
            Arguments::OneOf(index, values) => {
                for value in values {
                    rules.push(rule(index, SeccompCmpOp::Eq, *value)?);
                }
            }
            Arguments::Without(index, bits) => rules.push(rule(index, SeccompCmpOp::MaskedEq(bits.into()), 0)?),
        }
    }
    Ok(rules)
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
