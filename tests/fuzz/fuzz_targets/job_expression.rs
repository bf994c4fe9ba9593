//! Requirements, rank and owner policy: whatever the text, reading and evaluating it ends, and what was read from a text
//! is read from it again. Job and policy files as well: a mistake names a line that the file has.
#![no_main]

use std::path::Path;

use harrier_jobs::queue::expr::{Expr, Value};
use harrier_jobs::queue::{JobFile, NewJob};
use harrier_jobs::worker::Policy;
use libfuzzer_sys::fuzz_target;

fn scope(name: &str) -> Value {
    match name.len() % 4 {
        0 => Value::Number(name.len() as f64),
        1 => Value::Text(name.to_owned()),
        2 => Value::Bool(name.starts_with('a')),
        _ => Value::Undefined,
    }
}

fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else { return };
    match Expr::parse(text) {
        Ok(expr) => {
            let value = expr.eval(&scope);
            assert_eq!(expr.is_true(&scope), value == Value::Bool(true));
            assert!(!expr.number(&scope).is_nan());
            if expr.is_true(&scope) {
                assert!(expr.unmet(&scope).is_empty(), "{text:?} is true and unmet");
            }
            let again = Expr::parse(expr.text()).expect("it was read before");
            assert_eq!(again, expr);
        }
        Err(err) => assert!(err.column >= 1 && err.column <= text.chars().count() + 1, "{text:?}: {err}"),
    }
    let lines = text.lines().count() + 1;
    match JobFile::parse(text, Path::new("/")) {
        Ok(job) => {
            let json = serde_json::to_string(&job).expect("a job is JSON");
            let again: NewJob = serde_json::from_str(&json).expect("what was written is read");
            assert_eq!(again, job);
        }
        Err(err) => assert!(err.line >= 1 && err.line <= lines, "{text:?}: {err}"),
    }
    if let Err(err) = Policy::parse(text) {
        assert!(err.line >= 1 && err.line <= lines, "{text:?}: {err}");
    }
});
