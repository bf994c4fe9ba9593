//! Model-specific registers: RDMSR and WRMSR.
