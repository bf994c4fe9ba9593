//! Structures whose bytes are part of the ABI: each is declared once, and knows its own layout.

/// What a structure looks like in memory.
#[derive(Debug, Clone, Copy)]
pub struct Layout {
    /// The structure's name, as Rust has it.
    pub name: &'static str,
    /// What it is.
    pub doc: &'static str,
    /// Its size in bytes; there is no padding.
    pub size: usize,
    /// Its fields in order.
    pub fields: &'static [Field],
}

/// One field of a [`Layout`].
#[derive(Debug, Clone, Copy)]
pub struct Field {
    /// The field's name.
    pub name: &'static str,
    /// What it holds.
    pub doc: &'static str,
    /// Offset in bytes.
    pub offset: usize,
    /// Its type.
    pub kind: Kind,
}

/// The type of a field.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// An unsigned or signed number of 16, 32 or 64 bits.
    Number {
        /// Two's complement.
        signed: bool,
        /// Width.
        bits: u32,
    },
    /// So many bytes.
    Bytes(usize),
}

/// A type that a field can have.
pub(crate) trait Value: Sized {
    /// How it is described.
    const KIND: Kind;
    /// From the first bytes of `bytes`; what is missing is zero.
    fn take(bytes: &[u8]) -> Self;
    /// To the first bytes of `bytes`.
    fn put(&self, bytes: &mut [u8]);
}

macro_rules! number {
    ($($ty:ty: $signed:literal),*) => {$(
        impl Value for $ty {
            const KIND: Kind = Kind::Number { signed: $signed, bits: <$ty>::BITS };
            fn take(bytes: &[u8]) -> Self {
                <$ty>::from_le_bytes(Value::take(bytes))
            }
            fn put(&self, bytes: &mut [u8]) {
                self.to_le_bytes().put(bytes);
            }
        }
    )*};
}
number!(u16: false, u32: false, u64: false, i32: true, i64: true);

impl<const N: usize> Value for [u8; N] {
    const KIND: Kind = Kind::Bytes(N);
    fn take(bytes: &[u8]) -> Self {
        let mut array = [0; N];
        for (to, from) in array.iter_mut().zip(bytes) {
            *to = *from;
        }
        array
    }
    fn put(&self, bytes: &mut [u8]) {
        for (to, from) in bytes.iter_mut().zip(self) {
            *to = *from;
        }
    }
}

/// Declares a structure of the ABI.
macro_rules! layout {
    (
        $(#[doc = $doc:literal])+
        pub struct $name:ident {
            $($(#[doc = $field_doc:literal])+ pub $field:ident: $ty:ty,)+
        }
    ) => {
        $(#[doc = $doc])+
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        #[repr(C)]
        pub struct $name {
            $($(#[doc = $field_doc])+ pub $field: $ty,)+
        }

        impl Default for $name {
            /// All zero.
            fn default() -> Self {
                $name::from_bytes(&[])
            }
        }

        impl $name {
            /// Size in bytes.
            pub const SIZE: usize = size_of::<$name>();

            /// What it looks like in memory.
            pub const LAYOUT: $crate::layout::Layout = $crate::layout::Layout {
                name: stringify!($name),
                doc: concat!($($doc, "\n"),+),
                size: size_of::<$name>(),
                fields: &[$($crate::layout::Field {
                    name: stringify!($field),
                    doc: concat!($($field_doc, "\n"),+),
                    offset: core::mem::offset_of!($name, $field),
                    kind: <$ty as $crate::layout::Value>::KIND,
                }),+],
            };

            /// From the start of `bytes`; what is missing is zero.
            pub fn from_bytes(bytes: &[u8]) -> Self {
                $name {
                    $($field: $crate::layout::Value::take(
                        bytes.get(core::mem::offset_of!($name, $field)..).unwrap_or_default(),
                    ),)+
                }
            }

            /// As it is in memory.
            pub fn to_bytes(&self) -> [u8; size_of::<$name>()] {
                let mut bytes = [0; size_of::<$name>()];
                $(if let Some(to) = bytes.get_mut(core::mem::offset_of!($name, $field)..) {
                    $crate::layout::Value::put(&self.$field, to);
                })+
                bytes
            }
        }

        const _: () = assert!(size_of::<$name>() == 0 $(+ size_of::<$ty>())+, "a layout has no padding");
    };
}
pub(crate) use layout;
