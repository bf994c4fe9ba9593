//! Text to tokens.

use super::{ExprError, Value};

#[derive(Clone, Debug, PartialEq)]
pub(super) enum Token {
    Literal(Value),
    Name(String),
    /// An operator or bracket.
    Sign(&'static str),
}

/// A token and its bytes in the text.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Spanned {
    pub(super) token: Token,
    pub(super) span: (usize, usize),
}

/// Longest first.
const SIGNS: [&str; 15] = ["&&", "||", "==", "!=", "<=", ">=", "<", ">", "!", "(", ")", "+", "-", "*", "/"];

/// The column of a byte offset, from 1.
pub(super) fn column(text: &str, at: usize) -> usize {
    text.char_indices().take_while(|(offset, _)| *offset < at).count() + 1
}

pub(super) fn tokens(text: &str) -> Result<Vec<Spanned>, ExprError> {
    let mut tokens = Vec::new();
    let mut at = 0;
    while let Some(rest) = text.get(at..).filter(|rest| !rest.is_empty()) {
        let first = rest.chars().next().unwrap_or(' ');
        let fail = |offset: usize, message: String| ExprError { column: column(text, at + offset), message };
        let (token, length) = if first.is_whitespace() {
            at += first.len_utf8();
            continue;
        } else if first.is_ascii_digit() || first == '.' {
            number(rest).map_err(|(offset, message)| fail(offset, message))?
        } else if first == '"' || first == '\'' {
            let inner = rest.get(1..).unwrap_or_default();
            let end =
                inner.find(first).ok_or_else(|| fail(0, format!("the text has no closing quote {first}")))?;
            (Token::Literal(Value::Text(inner.get(..end).unwrap_or_default().to_owned())), end + 2)
        } else if first.is_alphabetic() || first == '_' {
            let length = rest
                .find(|c: char| !(c.is_alphanumeric() || matches!(c, '_' | '.' | '-')))
                .unwrap_or(rest.len());
            // A dash inside belongs to the name of a label only.
            let word = rest.get(..length).unwrap_or_default();
            let word = if word.contains('.') { word } else { word.split('-').next().unwrap_or(word) };
            let token = match word {
                "true" => Token::Literal(Value::Bool(true)),
                "false" => Token::Literal(Value::Bool(false)),
                _ => Token::Name(word.to_owned()),
            };
            (token, word.len())
        } else if let Some(sign) = SIGNS.iter().find(|sign| rest.starts_with(**sign)) {
            (Token::Sign(sign), sign.len())
        } else {
            let hint = match first {
                '=' => "write == to compare",
                '&' => "write && for and",
                '|' => "write || for or",
                _ => return Err(fail(0, format!("'{first}' has no meaning here: remove it"))),
            };
            return Err(fail(0, format!("'{first}' alone has no meaning: {hint}")));
        };
        tokens.push(Spanned { token, span: (at, at + length) });
        at += length;
    }
    Ok(tokens)
}

/// A number with its unit, and their length.
fn number(rest: &str) -> Result<(Token, usize), (usize, String)> {
    let digits = rest.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(rest.len());
    let text = rest.get(..digits).unwrap_or_default();
    let value: f64 = text.parse().map_err(|_| (0, format!("'{text}' is not a number")))?;
    let after = rest.get(digits..).unwrap_or_default();
    if after.starts_with('%') {
        return Ok((Token::Literal(Value::Number(value / 100.0)), digits + 1));
    }
    let letters = after.find(|c: char| !(c.is_alphanumeric() || c == '_')).unwrap_or(after.len());
    let unit = after.get(..letters).unwrap_or_default();
    let factor = match unit {
        "" => 1.0,
        "K" | "KiB" => 1024.0,
        "M" | "MiB" => 1024f64.powi(2),
        "G" | "GiB" => 1024f64.powi(3),
        "T" | "TiB" => 1024f64.powi(4),
        "ms" => 0.001,
        "s" => 1.0,
        "m" | "min" => 60.0,
        "h" => 3600.0,
        "d" => 86400.0,
        _ => {
            return Err((
                digits,
                format!("'{unit}' is not a unit: use K, M, G or T for sizes, ms, s, m, h or d for times"),
            ));
        }
    };
    let value = value * factor;
    if !value.is_finite() {
        return Err((0, format!("'{text}{unit}' is too large")));
    }
    Ok((Token::Literal(Value::Number(value)), digits + letters))
}
