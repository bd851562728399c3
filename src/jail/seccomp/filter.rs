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

/// How many calls are compared one after the other, once a binary search has found their group.
const CALLS_PER_GROUP: usize = 4;

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
    let calls: Vec<_> = by_call.into_iter().collect();
    let groups = calls.chunks(CALLS_PER_GROUP).map(|group| {
        let first = group.first().map_or(0, |(number, _)| *number);
        let program = compile_group(group).map_err(failed)?;
        Ok((u32::try_from(first).unwrap_or(u32::MAX), program))
    });
    let groups = groups.collect::<Result<Vec<_>, _>>()?;
    let mut program = refuse(list.refused);
    program.extend(select_group(&groups));
    Ok(program)
}

/// The program of seccompiler for some calls, which traps all others.
fn compile_group(calls: &[(libc::c_long, Vec<&Arguments>)]) -> Result<Vec<sock_filter>, BackendError> {
    let rules = calls.iter().map(|(number, arguments)| {
        // seccompiler always allows a call that has no rules.
        let any = arguments.contains(&&Arguments::Any);
        let rules = if any { Ok(Vec::new()) } else { rules(arguments) };
        Ok((*number, rules?))
    });
    let filter = SeccompFilter::new(
        rules.collect::<Result<_, BackendError>>()?,
        SeccompAction::Trap,
        SeccompAction::Allow,
        TargetArch::x86_64,
    );
    let program: BpfProgram = filter.and_then(TryInto::try_into)?;
    let instructions = program.into_iter().map(|instruction| sock_filter {
        code: instruction.code,
        jt: instruction.jt,
        jf: instruction.jf,
        k: instruction.k,
    });
    Ok(instructions.collect())
}

/// Instructions that find the program for the number of a call, which is in the accumulator, by binary search: each
/// program is for the numbers from its first one up to that of the next. When a list is installed, the kernel runs it
/// once for each number of a call that exists (`seccomp_cache_prepare` in kernel/seccomp.c), and a start of a container
/// installs many lists.
fn select_group(groups: &[(u32, Vec<sock_filter>)]) -> Vec<sock_filter> {
    const JUMP_IF_NOT_LESS: u16 = lower_half(libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K);
    const JUMP: u16 = lower_half(libc::BPF_JMP | libc::BPF_JA);
    let (lower, upper) = groups.split_at(groups.len() / 2);
    let Some((first, program)) = upper.first() else {
        return Vec::new();
    };
    if lower.is_empty() {
        return program.clone();
    }
    let (lower, upper) = (select_group(lower), select_group(upper));
    let skip_lower = u32::try_from(lower.len()).unwrap_or(u32::MAX);
    let compare = sock_filter {
        code: JUMP_IF_NOT_LESS,
        jt: 0,
        jf: 1,
        k: *first,
    };
    // A conditional jump skips at most 255 instructions.
    let jump = sock_filter {
        code: JUMP,
        jt: 0,
        jf: 0,
        k: skip_lower,
    };
    [compare, jump].into_iter().chain(lower).chain(upper).collect()
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
