//! The program's own pages, given back when the machine has settled.
//!
//! Most of the program serves its start: reading a command line, building a machine, loading a kernel. A page of it that is
//! needed again is mapped again from the file; the others count for nobody any more, however many monitors there are.
#![expect(unsafe_code, reason = "walks the loaded objects and gives back their unwritten pages")]

/// Gives back the pages of the program and its libraries that nobody can have written to.
pub(crate) fn give_back() {
    // SAFETY: the callback matches what the C library calls, and needs no data.
    unsafe {
        libc::dl_iterate_phdr(Some(give_back_object), std::ptr::null_mut());
    }
}

/// Gives back the segments of one loaded object that are mapped from its file and not writable.
unsafe extern "C" fn give_back_object(
    info: *mut libc::dl_phdr_info,
    size: libc::size_t,
    _data: *mut libc::c_void,
) -> libc::c_int {
    // The kernel's object has no file.
    let has_file = |name: *const libc::c_char| {
        // SAFETY: the C library keeps the names of loaded objects as strings.
        name.is_null() || !unsafe { std::ffi::CStr::from_ptr(name) }.to_bytes().starts_with(b"linux-vdso")
    };
    if size < size_of::<libc::dl_phdr_info>() {
        return 0;
    }
    // SAFETY: the C library passes a structure of `size` bytes that is valid during the call.
    let info = unsafe { &*info };
    if info.dlpi_phdr.is_null() || !has_file(info.dlpi_name) {
        return 0;
    }
    // SAFETY: the object has so many program headers there.
    let headers = unsafe { std::slice::from_raw_parts(info.dlpi_phdr, info.dlpi_phnum.into()) };
    for header in headers.iter().filter(|header| header.p_type == libc::PT_LOAD) {
        if header.p_flags & libc::PF_W != 0 {
            continue;
        }
        let begin = info.dlpi_addr.wrapping_add(header.p_vaddr);
        let (page, len) = (begin & !0xfff, header.p_memsz.wrapping_add(begin & 0xfff));
        // SAFETY: the pages of this range are a private mapping of the object's file, without the right to write: what is
        // dropped is read from the file again. Where the host refuses, they stay.
        unsafe {
            libc::madvise(page as *mut libc::c_void, len as usize, libc::MADV_DONTNEED);
        }
    }
    0
}

#[cfg(test)]
mod tests {
    use crate::own_memory::tests::resident_kib;

    #[test]
    fn the_programs_pages_go_back_and_come_again() {
        let before = resident_kib("RssFile:");
        super::give_back();
        let after = resident_kib("RssFile:");
        assert!(after < before, "{before} KiB before, {after} KiB after");
        assert_eq!(format!("{:>5.1}", 2.5_f64), "  2.5");
    }
}
