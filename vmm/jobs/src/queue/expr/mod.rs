//! The small language of requirements, rank and owner policy.
//!
//! `engine == "kvm" && memory >= 4G && !(labels.room == "lab")`
//!
//! | | |
//! |---|---|
//! | values | numbers, `"text"` or `'text'`, `true`, `false`; names of what a host or an owner's machine has |
//! | sizes | `K M G T` after a number, powers of 1024: `512M` |
//! | times | `ms s m h d` after a number, in seconds: `15m` is 900 |
//! | share | `%` after a number: `50%` is 0.5 |
//! | operators, tightest first | `!` and `-`; `* /`; `+ -`; `< <= > >=`; `== !=`; `&&`; `\|\|` |
//! | `defined(name)` | whether the name has a value here |
//!
//! A name without a value is undefined, and so is what is made of it, as in SQL and ClassAds: `undefined && false` is
//! false, `undefined || true` is true. Comparing values of different kinds is undefined too. Something is a match only
//! if it is true.

mod lexer;
mod parser;

use std::fmt;

use thiserror::Error;

pub(crate) use parser::{Node, Op};

/// The longest expression, in bytes.
pub const MAX_LENGTH: usize = 4096;

/// What a text is not.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("column {column}: {message}")]
pub struct ExprError {
    /// From 1, in characters.
    pub column: usize,
    /// What is wrong and what to do.
    pub message: String,
}

/// A value.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// There is none.
    Undefined,
    /// True or false.
    Bool(bool),
    /// A number; sizes are bytes, times seconds.
    Number(f64),
    /// Text.
    Text(String),
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Undefined => f.write_str("undefined"),
            Self::Bool(value) => write!(f, "{value}"),
            Self::Number(value) => write!(f, "{value}"),
            Self::Text(text) => write!(f, "{text:?}"),
        }
    }
}

/// Where names have values.
pub trait Scope {
    /// The value of a name; with dots, as in `labels.room`.
    fn value(&self, name: &str) -> Value;
}

impl<F: Fn(&str) -> Value> Scope for F {
    fn value(&self, name: &str) -> Value {
        self(name)
    }
}

/// A parsed expression.
#[derive(Clone, Debug, PartialEq)]
pub struct Expr {
    text: String,
    root: Node,
}

impl Expr {
    /// Reads an expression.
    pub fn parse(text: &str) -> Result<Self, ExprError> {
        if text.len() > MAX_LENGTH {
            let message = format!("{} bytes are too long: {MAX_LENGTH} at most", text.len());
            return Err(ExprError { column: MAX_LENGTH, message });
        }
        Ok(Self { root: parser::parse(text)?, text: text.to_owned() })
    }

    /// Reads an expression that uses no other names than these; one that ends in `.` stands for all that begin so.
    pub fn parse_with(text: &str, names: &[&str]) -> Result<Self, ExprError> {
        let expr = Self::parse(text)?;
        let mut unknown = None;
        expr.root.visit(&mut |node| {
            if let Op::Name(name) = &node.op {
                let known = names.iter().any(|known| match known.strip_suffix('.') {
                    Some(_) => name.starts_with(known) && name.len() > known.len(),
                    None => known == name,
                });
                if !known && unknown.is_none() {
                    unknown = Some((node.span.0, name.clone()));
                }
            }
        });
        match unknown {
            None => Ok(expr),
            Some((at, name)) => Err(ExprError {
                column: lexer::column(text, at),
                message: format!("'{name}' is unknown: use one of {}", names.join(", ")),
            }),
        }
    }

    /// One that is never true.
    pub fn never() -> Self {
        let root = Node { op: Op::Literal(Value::Bool(false)), children: Vec::new(), span: (0, 5) };
        Self { text: "false".to_owned(), root }
    }

    /// The text it was read from.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Its value.
    pub fn eval(&self, scope: &dyn Scope) -> Value {
        eval(&self.root, scope)
    }

    /// Whether it is true; undefined is not.
    pub fn is_true(&self, scope: &dyn Scope) -> bool {
        self.eval(scope) == Value::Bool(true)
    }

    /// Its number, for a rank: true is 1; what is no number is 0.
    pub fn number(&self, scope: &dyn Scope) -> f64 {
        match self.eval(scope) {
            Value::Number(number) if !number.is_nan() => number,
            Value::Bool(true) => 1.0,
            _ => 0.0,
        }
    }

    /// The parts joined by `&&` that are not true, each with the values of its names, for people.
    pub fn unmet(&self, scope: &dyn Scope) -> Vec<String> {
        let mut parts = Vec::new();
        self.root.conjuncts(&mut |node| {
            let value = eval(node, scope);
            if value != Value::Bool(true) {
                let (from, to) = node.span;
                let mut line = format!("{} is {value}", self.text.get(from..to).unwrap_or_default().trim());
                let mut names: Vec<&str> = Vec::new();
                node.visit(&mut |node| {
                    if let Op::Name(name) = &node.op
                        && !names.contains(&name.as_str())
                    {
                        names.push(name);
                    }
                });
                let values: Vec<String> =
                    names.iter().map(|name| format!("{name} is {}", scope.value(name))).collect();
                if !values.is_empty() {
                    line.push_str(&format!(" ({})", values.join(", ")));
                }
                parts.push(line);
            }
        });
        parts
    }
}

fn eval(node: &Node, scope: &dyn Scope) -> Value {
    use Value::{Bool, Number, Text, Undefined};
    let of = |index: usize| node.children.get(index).map_or(Undefined, |child| eval(child, scope));
    match &node.op {
        Op::Literal(value) => value.clone(),
        Op::Name(name) => scope.value(name),
        Op::Defined => Bool(of(0) != Undefined),
        Op::Not => match of(0) {
            Bool(value) => Bool(!value),
            _ => Undefined,
        },
        Op::Negate => match of(0) {
            Number(value) => Number(-value),
            _ => Undefined,
        },
        Op::And => match of(0) {
            Bool(false) => Bool(false),
            left => match (left, of(1)) {
                (_, Bool(false)) => Bool(false),
                (Bool(true), Bool(true)) => Bool(true),
                _ => Undefined,
            },
        },
        Op::Or => match of(0) {
            Bool(true) => Bool(true),
            left => match (left, of(1)) {
                (_, Bool(true)) => Bool(true),
                (Bool(false), Bool(false)) => Bool(false),
                _ => Undefined,
            },
        },
        Op::Compare(comparison) => {
            let ordering = match (of(0), of(1)) {
                (Number(left), Number(right)) => left.partial_cmp(&right),
                (Text(left), Text(right)) => Some(left.cmp(&right)),
                (Bool(left), Bool(right)) => Some(left.cmp(&right)),
                _ => None,
            };
            ordering.map_or(Undefined, |ordering| Bool(comparison.holds(ordering)))
        }
        Op::Arithmetic(sign) => match (of(0), of(1)) {
            (Number(left), Number(right)) => {
                let result = match sign {
                    b'+' => left + right,
                    b'-' => left - right,
                    b'*' => left * right,
                    _ => left / right,
                };
                if result.is_finite() { Number(result) } else { Undefined }
            }
            _ => Undefined,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scope(name: &str) -> Value {
        match name {
            "cpus" => Value::Number(4.0),
            "memory" => Value::Number(8.0 * (1u64 << 30) as f64),
            "engine" => Value::Text("soft".to_owned()),
            "busy" => Value::Bool(false),
            "labels.room" => Value::Text("lab".to_owned()),
            _ => Value::Undefined,
        }
    }

    fn value(text: &str) -> Value {
        Expr::parse(text).unwrap_or_else(|err| panic!("{text}: {err}")).eval(&scope)
    }

    #[test]
    fn operators_bind_as_in_c_and_units_count() {
        for (text, number) in [
            ("1 + 2 * 3", 7.0),
            ("(1 + 2) * 3", 9.0),
            ("10 - 3 - 2", 5.0),
            ("-2 * -3", 6.0),
            ("8 / 2 / 2", 2.0),
            ("1.5G", 1.5 * (1u64 << 30) as f64),
            ("90m", 5400.0),
            ("250ms", 0.25),
            ("50%", 0.5),
            ("2d - 1h", 169_200.0),
        ] {
            assert_eq!(value(text), Value::Number(number), "{text}");
        }
        for text in [
            "cpus >= 2 && memory > 4G",
            "engine == 'soft' || engine == \"kvm\"",
            "!busy",
            "!(cpus < 2)",
            "labels.room == 'lab' && engine != 'kvm'",
            "1 < 2 == true",
            "false && true || true",
            "!defined(labels.gpu)",
        ] {
            assert_eq!(value(text), Value::Bool(true), "{text}");
        }
    }

    #[test]
    fn undefined_spreads_unless_the_other_side_decides() {
        for text in
            ["nothing", "nothing > 1", "!nothing", "nothing && true", "nothing || false", "1 / 0", "'a' < 1"]
        {
            assert_eq!(value(text), Value::Undefined, "{text}");
        }
        assert_eq!(value("nothing && false"), Value::Bool(false));
        assert_eq!(value("nothing || true"), Value::Bool(true));
    }

    #[test]
    fn mistakes_name_the_column() {
        for (text, column, part) in [
            ("", 1, "nothing"),
            ("cpus >", 7, "ends"),
            ("(1", 3, "')'"),
            ("1 2", 3, "operator"),
            ("memory = 4G", 8, "=="),
            ("a & b", 3, "&&"),
            ("'open", 1, "quote"),
            ("4X", 2, "unit"),
            ("grün >= 1 $", 11, "'$'"),
            ("defined(1)", 9, "name"),
        ] {
            let err = Expr::parse(text).unwrap_err();
            assert_eq!(err.column, column, "{text}: {err}");
            assert!(err.message.contains(part), "{text}: {err}");
        }
        let deep = format!("{}1{}", "(".repeat(500), ")".repeat(500));
        assert!(Expr::parse(&deep).unwrap_err().message.contains("nested"));
        assert!(Expr::parse(&"!".repeat(2000)).unwrap_err().message.contains("nested"));
        assert!(Expr::parse(&"1+".repeat(3000)).unwrap_err().message.contains("too long"));
        assert_eq!(value(&format!("1{}", "+1".repeat(1000))), Value::Number(1001.0));
    }

    #[test]
    fn names_can_be_limited() {
        let names = ["cpus", "labels."];
        assert!(Expr::parse_with("cpus > 1 && labels.x == 'y'", &names).is_ok());
        let err = Expr::parse_with("cpu > 1", &names).unwrap_err();
        assert_eq!((err.column, err.message.contains("'cpu' is unknown")), (1, true));
        assert!(Expr::parse_with("labels", &names).is_err());
    }

    #[test]
    fn what_is_unmet_is_told_with_its_values() {
        let expr = Expr::parse("cpus >= 2 && memory >= 16G && (labels.gpu == 'x' || busy)").unwrap();
        assert_eq!(
            expr.unmet(&scope),
            [
                "memory >= 16G is false (memory is 8589934592)",
                "(labels.gpu == 'x' || busy) is undefined (labels.gpu is undefined, busy is false)",
            ]
        );
    }
}
