//! PNGs guard each chunk with a checksum, behind which most changes of their bytes would end.

/// Bytes before the first chunk.
const SIGNATURE: usize = 8;

/// Gives every whole chunk of a PNG the checksum of its content.
pub fn mend_png(png: &mut [u8]) {
    let mut rest = png.get_mut(SIGNATURE..).unwrap_or_default();
    while let Some((length, chunk)) = rest.split_first_chunk_mut::<4>() {
        // Type and data; the checksum of four bytes follows.
        let length = 4 + u32::from_be_bytes(*length) as usize;
        let Some((content, after)) = chunk.split_at_mut_checked(length) else { return };
        let Some((checksum, after)) = after.split_first_chunk_mut::<4>() else { return };
        *checksum = crc32fast::hash(content).to_be_bytes();
        rest = after;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_whole_chunk_gets_its_checksum() {
        let end = b"\0\0\0\0IEND\xaeB`\x82";
        let mut png =
            [&[0; SIGNATURE][..], end, b"\0\0\0\x01IDATx\0\0\0\0", b"\0\0\0\x09IDATx"].concat();
        png[SIGNATURE + 8] = 0;
        mend_png(&mut png);
        assert_eq!(&png[SIGNATURE..][..end.len()], end, "annex D of the PNG specification");
        let data = SIGNATURE + end.len() + 8;
        assert_eq!(png[data + 1..][..4], crc32fast::hash(b"IDATx").to_be_bytes());
        assert!(png.ends_with(b"\x09IDATx"), "what is cut short stays");
        mend_png(&mut []);
    }
}
