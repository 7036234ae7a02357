package piv

// ATR is the card's answer to reset (ISO 7816-3, section 8.2): protocol T=1
// with the longest waiting time that can be asked for, 46 s at 4 MHz, because
// an answer may wait for a finger; and historical bytes that name the PIV
// application, by which readers know the card at first sight (ISO 7816-4,
// section 12.1.1: category 0x80, then compact TLVs; tag F is an application
// identifier).
func ATR() []byte {
	const (
		direct     = 0x3b // TS
		td         = 0x80 // TD follows
		ta, tb     = 0x10, 0x20
		t1         = 0x01
		infoField  = 0xfe // TA3: 254 bytes in a block
		waiting    = 0x9d // TB3: BWI 9, CWI 13
		compactTLV = 0x80
	)
	name := aid[:9]
	historical := append([]byte{compactTLV, 0xf0 | byte(len(name))}, name...)
	b := []byte{direct, td | byte(len(historical)), td | t1, ta | tb | t1, infoField, waiting}
	b = append(b, historical...)
	var check byte // TCK, over all but TS
	for _, x := range b[1:] {
		check ^= x
	}
	return append(b, check)
}
