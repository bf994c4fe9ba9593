//! Tokens to a tree, by precedence climbing. Chains of the same precedence are built in a loop, so the depth of the
//! recursion is that of the brackets and signs, which is limited; the depth of the tree is limited by the text's
//! length.

use std::cmp::Ordering;

use super::lexer::{Spanned, Token, column, tokens};
use super::{ExprError, Value};

/// Brackets and signs within each other.
const MAX_NESTING: usize = 64;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Comparison {
    Less,
    LessOrEqual,
    Greater,
    GreaterOrEqual,
    Equal,
    NotEqual,
}

impl Comparison {
    pub(super) fn holds(self, ordering: Ordering) -> bool {
        match self {
            Self::Less => ordering.is_lt(),
            Self::LessOrEqual => ordering.is_le(),
            Self::Greater => ordering.is_gt(),
            Self::GreaterOrEqual => ordering.is_ge(),
            Self::Equal => ordering.is_eq(),
            Self::NotEqual => ordering.is_ne(),
        }
    }
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Op {
    Literal(Value),
    Name(String),
    Defined,
    Not,
    Negate,
    And,
    Or,
    Compare(Comparison),
    /// One of `+ - * /`.
    Arithmetic(u8),
}

/// One node and the bytes of the text that it stands for.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Node {
    pub(crate) op: Op,
    pub(crate) children: Vec<Node>,
    pub(crate) span: (usize, usize),
}

impl Node {
    /// Calls `see` for this node and all below it.
    pub(crate) fn visit<'a>(&'a self, see: &mut impl FnMut(&'a Node)) {
        see(self);
        self.children.iter().for_each(|child| child.visit(see));
    }

    /// Calls `see` for the parts that `&&` joins.
    pub(crate) fn conjuncts<'a>(&'a self, see: &mut impl FnMut(&'a Node)) {
        if self.op == Op::And {
            self.children.iter().for_each(|child| child.conjuncts(see));
        } else {
            see(self);
        }
    }
}

pub(super) fn parse(text: &str) -> Result<Node, ExprError> {
    let tokens = tokens(text)?;
    if tokens.is_empty() {
        return Err(ExprError { column: 1, message: "there is nothing: write an expression".to_owned() });
    }
    let mut parser = Parser { text, tokens, next: 0, nesting: 0 };
    let node = parser.binary(0)?;
    match parser.tokens.get(parser.next) {
        None => Ok(node),
        Some(_) => Err(parser.fail("an operator is missing before this")),
    }
}

struct Parser<'a> {
    text: &'a str,
    tokens: Vec<Spanned>,
    next: usize,
    nesting: usize,
}

/// The binary operators, loosest first.
fn binary(sign: &str) -> Option<(u8, Op)> {
    Some(match sign {
        "||" => (0, Op::Or),
        "&&" => (1, Op::And),
        "==" => (2, Op::Compare(Comparison::Equal)),
        "!=" => (2, Op::Compare(Comparison::NotEqual)),
        "<" => (3, Op::Compare(Comparison::Less)),
        "<=" => (3, Op::Compare(Comparison::LessOrEqual)),
        ">" => (3, Op::Compare(Comparison::Greater)),
        ">=" => (3, Op::Compare(Comparison::GreaterOrEqual)),
        "+" => (4, Op::Arithmetic(b'+')),
        "-" => (4, Op::Arithmetic(b'-')),
        "*" => (5, Op::Arithmetic(b'*')),
        "/" => (5, Op::Arithmetic(b'/')),
        _ => return None,
    })
}

const HIGHEST: u8 = 5;

impl Parser<'_> {
    fn fail(&self, message: &str) -> ExprError {
        let at = self.tokens.get(self.next).map_or(self.text.len(), |token| token.span.0);
        ExprError { column: column(self.text, at), message: message.to_owned() }
    }

    fn sign(&self) -> Option<&'static str> {
        match self.tokens.get(self.next)?.token {
            Token::Sign(sign) => Some(sign),
            _ => None,
        }
    }

    /// Operands joined by operators that bind at least as tightly as `level`.
    fn binary(&mut self, level: u8) -> Result<Node, ExprError> {
        if level > HIGHEST {
            return self.unary();
        }
        let mut left = self.binary(level + 1)?;
        while let Some((found, op)) = self.sign().and_then(binary)
            && found == level
        {
            self.next += 1;
            let right = self.binary(level + 1)?;
            let span = (left.span.0, right.span.1);
            left = Node { op, children: vec![left, right], span };
        }
        Ok(left)
    }

    fn unary(&mut self) -> Result<Node, ExprError> {
        if self.nesting >= MAX_NESTING {
            return Err(self.fail("nested too deeply: use fewer brackets"));
        }
        self.nesting += 1;
        let node = self.unary_or_primary();
        self.nesting -= 1;
        node
    }

    fn unary_or_primary(&mut self) -> Result<Node, ExprError> {
        let Some(Spanned { token, span }) = self.tokens.get(self.next).cloned() else {
            return Err(self.fail("the expression ends where a value should stand"));
        };
        let leaf = |op| Node { op, children: Vec::new(), span };
        match token {
            Token::Literal(value) => {
                self.next += 1;
                Ok(leaf(Op::Literal(value)))
            }
            Token::Name(name) => {
                self.next += 1;
                if name == "defined" && self.sign() == Some("(") {
                    self.defined(span.0)
                } else {
                    Ok(leaf(Op::Name(name)))
                }
            }
            Token::Sign(sign @ ("!" | "-")) => {
                self.next += 1;
                let child = self.unary()?;
                let span = (span.0, child.span.1);
                let op = if sign == "!" { Op::Not } else { Op::Negate };
                Ok(Node { op, children: vec![child], span })
            }
            Token::Sign("(") => {
                self.next += 1;
                let mut node = self.binary(0)?;
                node.span = (span.0, self.close()?);
                Ok(node)
            }
            Token::Sign(_) => Err(self.fail("a value should stand here")),
        }
    }

    fn close(&mut self) -> Result<usize, ExprError> {
        if self.sign() != Some(")") {
            return Err(self.fail("a ')' is missing here"));
        }
        let end = self.tokens.get(self.next).map_or(0, |token| token.span.1);
        self.next += 1;
        Ok(end)
    }

    fn defined(&mut self, from: usize) -> Result<Node, ExprError> {
        self.next += 1;
        let child = match self.tokens.get(self.next).cloned() {
            Some(Spanned { token: Token::Name(name), span }) => {
                Node { op: Op::Name(name), children: Vec::new(), span }
            }
            _ => return Err(self.fail("a name should stand here")),
        };
        self.next += 1;
        let end = self.close()?;
        Ok(Node { op: Op::Defined, children: vec![child], span: (from, end) })
    }
}
