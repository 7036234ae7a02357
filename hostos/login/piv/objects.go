package piv

import (
	"fmt"
	"unicode/utf8"
)

// Data objects (part 1, table 3).
const (
	tagDiscovery = 0x7e
	tagCHUID     = 0x5fc102
	tagCCC       = 0x5fc107
	tagPrinted   = 0x5fc109
)

// certificateTags are the objects of the slots' certificates.
var certificateTags = map[Slot]uint32{
	Authentication: 0x5fc105, Signature: 0x5fc10a, KeyManagement: 0x5fc10b, CardAuthentication: 0x5fc101,
}

// maxCertificate bounds a certificate in bytes: longer ones than part 1 table 7
// foresees are common, and readers ask for what there is.
const maxCertificate = 8 << 10

// object wraps the content of a data object for GET DATA (section 3.1.2).
func object(content []byte) []byte { return tlv(nil, 0x53, content) }

// errorDetection is the empty last element of most objects (tag FE).
func errorDetection(b []byte) []byte { return tlv(b, 0xfe, nil) }

// objects encodes the data objects of a card.
func (p Profile) objects() (map[uint32][]byte, error) {
	out := map[uint32][]byte{
		tagDiscovery: discovery(),
		tagCHUID:     object(p.chuid()),
		tagCCC:       object(p.capabilities()),
		tagPrinted:   object(p.printed()),
	}
	for slot, k := range p.Keys {
		tag, ok := certificateTags[slot]
		if !ok {
			return nil, fmt.Errorf("piv: no slot %v on this card", slot)
		}
		if len(k.Certificate) > maxCertificate {
			return nil, fmt.Errorf("piv: certificate %v of %d bytes, at most %d", slot, len(k.Certificate), maxCertificate)
		}
		if len(k.Certificate) == 0 {
			continue // answered by 6A82, as on a card that is not yet issued
		}
		b := tlv(nil, 0x70, k.Certificate)
		b = tlv(b, 0x71, []byte{0}) // not compressed
		out[tag] = object(errorDetection(b))
	}
	return out, nil
}

// discovery is the discovery object (part 1, section 3.3.2): the application,
// and that its own PIN is the one to verify.
func discovery() []byte {
	b := tlv(nil, 0x4f, aid)
	return tlv(nil, tagDiscovery, tlv(b, 0x5f2f, []byte{0x40, 0x00}))
}

// chuid is the card holder unique identifier (part 1, section 3.1.2). Outside
// the United States' federal agencies the FASC-N is all nines, with the agency
// code 9999 and the GUID to identify the card; it is not signed.
func (p Profile) chuid() []byte {
	b := tlv(nil, 0x30, fascN())
	b = tlv(b, 0x34, p.GUID[:])
	b = tlv(b, 0x35, []byte(p.Expires.UTC().Format("20060102")))
	b = tlv(b, 0x3e, nil) // issuer's signature
	return errorDetection(b)
}

// fascN is the non-federal FASC-N of the PACS technical guidance 2.3, section
// 6.6: agency 9999, system 9999, credential 999999, series 0, issue 1, person
// 0000000000, organisational category 3 and 0000, association 1, in BCD digits
// of five bits with odd parity, least significant bit first, between start
// (B), field (D) and end (F) marks, with a check digit.
func fascN() []byte {
	const start, field, end = 0xb, 0xd, 0xf
	digits := []byte{start, 9, 9, 9, 9, field, 9, 9, 9, 9, field, 9, 9, 9, 9, 9, 9, field, 0, field, 1, field,
		0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 1, end}
	var check byte
	for _, d := range digits {
		check ^= d
	}
	var out []byte
	var acc uint
	var n uint
	for _, d := range append(digits, check) {
		ones := uint(1)
		for i := range 4 {
			bit := uint(d) >> i & 1
			acc, n, ones = acc<<1|bit, n+1, ones^bit
		}
		acc, n = acc<<1|ones, n+1
		for ; n >= 8; n -= 8 {
			out = append(out, byte(acc>>(n-8)))
		}
	}
	return out
}

// capabilities is the card capability container (part 1, section 3.1.1). Its
// content is of the older Government Smart Card model; readers want the fields
// to be there.
func (p Profile) capabilities() []byte {
	// Registered application provider, manufacturer, card type, then an
	// identifier of this card (GSC-IS 2.1, section 6.2).
	id := append([]byte{0xa0, 0x00, 0x00, 0x01, 0x16, 0xff, 0x02}, p.GUID[2:]...)
	b := tlv(nil, 0xf0, id)
	b = tlv(b, 0xf1, []byte{0x21}) // version of the container
	b = tlv(b, 0xf2, []byte{0x21}) // version of its grammar
	b = tlv(b, 0xf3, nil)
	b = tlv(b, 0xf4, []byte{0x00}) // no PKCS #15
	b = tlv(b, 0xf5, []byte{0x10}) // registered data model: PIV
	for tag := uint32(0xf6); tag <= 0xfd; tag++ {
		if tag != 0xf8 && tag != 0xf9 {
			b = tlv(b, tag, nil)
		}
	}
	return errorDetection(b)
}

// printed is the printed information (part 1, section 3.1.7).
func (p Profile) printed() []byte {
	b := tlv(nil, 0x01, []byte(clip(p.Name, 125)))
	b = tlv(b, 0x02, nil)
	b = tlv(b, 0x04, []byte(p.Expires.UTC().Format("2006Jan02")))
	b = tlv(b, 0x05, []byte(fmt.Sprintf("%X", p.GUID[12:])))
	b = tlv(b, 0x06, []byte(clip(p.Agency, 15)))
	return errorDetection(b)
}

// clip cuts s to at most n bytes between two characters.
func clip(s string, n int) string {
	for len(s) > n {
		_, size := utf8.DecodeLastRuneInString(s)
		s = s[:len(s)-size]
	}
	return s
}
