//! The cases, by what they look at. Each takes a runtime handler, makes its pods, and fails by panic.

mod pods;

use crate::pod::Handler;

/// A case.
type Case = fn(Handler);

macro_rules! cases {
    ($($module:ident: $($name:ident)*;)*) => {
        /// Every case by its name.
        pub(crate) const CASES: &[(&str, Case)] = &[
            $($((concat!(stringify!($module), "::", stringify!($name)), $module::$name as Case),)*)*
        ];
    };
}

cases! {
    pods: pod_of_one;
}
