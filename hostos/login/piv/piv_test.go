package piv

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"
)

func unhex(t testing.TB, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(strings.ReplaceAll(s, " ", ""))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// What clients send before anybody logs in, in their order, and what the card
// has to answer. "*" is any data; the status word is the end.
//
// Windows: the discovery process of "Smart card minidrivers", Microsoft Learn:
// plug and play asks its own application and the generic card's, the card's
// class minidriver then takes the PIV application. OpenSC: recorded from
// 0.23 (opensc-tool, pkcs11-tool) at this card.
var recorded = map[string][][2]string{
	"Windows discovery": {
		{"00A4040009 A0000003974254465900", "6A82"},       // GIDS, without version
		{"00A404000B A0000003974254465902 01 00", "6A82"}, // GIDS
		{"00A404000B A000000397434944 5F0100 00", "6A82"}, // plug and play
		{"00A40000023F00", "6A82"},                        // MF
		{"00A40200022F01", "6A82"},                        // EF.ATR
		{"00CA7F6800", "6D00"},                            // device identifier
		{"00A4040009 A00000030800001000 00", "61*9000"},   // PIV
		{"00CB3FFF055C035FC10200", "533B*9000"},           // CHUID
		{"00CB3FFF035C017E00", "7E12*9000"},               // discovery
		{"00CB3FFF055C035FC10700", "5333*9000"},           // capabilities
		{"00CB3FFF055C035FC10500", "5382*9000"},           // certificate 9A
		{"00CB3FFF055C035FC10C00", "6A82"},                // key history
		{"0020008000", "63C3"},                            // tries
		{"00200080", "63C3"},                              // the same without Le
	},
	"OpenSC": {
		{"00CB3FFF035C017E00", "6D00"},
		{"00A4040009 A00000030800001000 00", "61*9000"},
		{"00CB3FFF035C017E00", "7E12*9000"},
		{"00CB3FFF055C035FC10700", "5333*9000"},
		{"00CB3FFF055C035FC10C00", "6A82"},
		{"0087009B04 7C028100 00", "7C128110*9000"}, // random data
		{"00CB3FFF055C035FC10900", "6982"},          // printed information needs the PIN
		{"00FD000000", "6D00"},                      // is it a YubiKey?
	},
	"refused": {
		{"00A4040005 A000000308 00", "61*9000"},
		{"80CB3FFF035C017E00", "6E00"},
		{"04CB3FFF035C017E00", "6882"},
		{"01CB3FFF035C017E00", "6881"},
		{"00CB3F00035C017E00", "6A86"},
		{"00CB3FFF035C027E00", "6A80"},
		{"00CB3FFF", "6A80"},
		{"0020008008 31323334FFFFFFFF", "6A80"}, // four digits are no PIN
		{"0020008008 31323334353600FF", "6A80"},
		{"0020008006 313233343536", "6A80"},
		{"0020000008 313233343536FFFF", "6A88"}, // global PIN
		{"002C008010 3132333435363738313233343536FFFF", "6A88"},
		{"00DB3FFF08 5C035FC105530100", "6982"}, // only the organisation writes
		{"0047009A05 AC03800111", "6982"},
		{"00C0000000", "6985"},
		{"00", "6700"}, {"00A404", "6700"}, {"00A4040009A0", "6700"},
	},
}

func TestRecorded(t *testing.T) {
	for client, steps := range recorded {
		t.Run(client, func(t *testing.T) {
			f := newCard(t, false)
			for _, s := range steps {
				command := unhex(t, s[0])
				data, sw := f.all(command...)
				got := hex.EncodeToString(sw.append(data))
				head, tail, any := strings.Cut(strings.ToLower(s[1]), "*")
				if !any && got != head || any && !(strings.HasPrefix(got, head) && strings.HasSuffix(got, tail)) {
					t.Errorf("%X: %s, want %s", command, got, s[1])
				}
			}
		})
	}
}

// A response longer than a short one comes in pieces, and an extended Le has
// it in one.
func TestLongResponse(t *testing.T) {
	f := newCard(t, false)
	f.choose()
	short := f.want(OK, unhex(t, "00CB3FFF055C035FC10500")...)
	long, sw := f.send(unhex(t, "00CB3FFF0000055C035FC1050000")...)
	if sw != OK || !bytes.Equal(short, long) || len(long) < 257 {
		t.Errorf("in one piece %d bytes and %04X, in several %d", len(long), uint16(sw), len(short))
	}
	if !bytes.Contains(long, f.cert[Authentication].Raw) {
		t.Error("the certificate is not in its object")
	}
	// Without Le, as T=0 has it, all is fetched.
	first, sw := f.send(unhex(t, "00CB3FFF055C035FC105")...)
	if len(first) != 0 || sw != MoreData {
		t.Errorf("without Le: %d bytes, %04X", len(first), uint16(sw))
	}
	if rest, _ := f.all(0, insGetResponse, 0, 0, 0); !bytes.Equal(rest, short) {
		t.Error("GET RESPONSE gives something else")
	}
	// Another command in between drops the rest.
	f.send(unhex(t, "00CB3FFF055C035FC10500")...)
	f.want(OK, unhex(t, "00CB3FFF035C017E00")...)
	f.want(ConditionsOfUse, 0, insGetResponse, 0, 0, 0)
}

// authenticate sends GENERAL AUTHENTICATE in chained commands of at most 200
// bytes and returns what the template holds.
func (f *fixture) authenticate(alg byte, slot Slot, template []byte) ([]byte, Status) {
	f.t.Helper()
	for len(template) > 200 {
		f.want(OK, append([]byte{claChain, insAuthenticate, alg, byte(slot), 200}, template[:200]...)...)
		template = template[200:]
	}
	data, sw := f.all(append(append([]byte{0, insAuthenticate, alg, byte(slot), byte(len(template))}, template...), 0)...)
	if sw != OK {
		if len(data) > 0 {
			f.t.Errorf("status %04X with %d bytes of data", uint16(sw), len(data))
		}
		return nil, sw
	}
	tag, body, _, ok := nextTLV(data)
	if !ok || tag != tagTemplate {
		f.t.Fatalf("answer %x is no template", data)
	}
	tag, out, _, ok := nextTLV(body)
	if !ok || tag != tagResponse {
		f.t.Fatalf("answer %x has no response", data)
	}
	return out, OK
}

func TestSignatures(t *testing.T) {
	digest := sha256.Sum256([]byte("sekisho"))
	f := newCard(t, false)
	f.choose()
	f.login()
	for _, slot := range []Slot{Authentication, CardAuthentication, Signature} { // 9C uses the PIN up
		alg := map[Slot]byte{Authentication: algP256, CardAuthentication: algP256, Signature: algP384}[slot]
		sig, sw := f.authenticate(alg, slot, challenge(tagChallenge, digest[:]))
		if sw != OK || !ecdsa.VerifyASN1(f.cert[slot].PublicKey.(*ecdsa.PublicKey), digest[:], sig) {
			t.Errorf("%v: %04X, signature of %d bytes", slot, uint16(sw), len(sig))
		}
	}
	// 9C wants the PIN each time, and took it.
	if _, sw := f.authenticate(algP384, Signature, challenge(tagChallenge, digest[:])); sw != SecurityStatus {
		t.Errorf("a second signature by 9C with one PIN: %04X", uint16(sw))
	}
	if _, sw := f.authenticate(algP256, CardAuthentication, challenge(tagChallenge, digest[:])); sw != OK {
		t.Errorf("9E without PIN: %04X", uint16(sw))
	}
	f.login()
	for what, c := range map[string]struct {
		alg  byte
		slot Slot
		data []byte
		want Status
	}{
		"another algorithm":      {algP384, Authentication, challenge(tagChallenge, digest[:]), WrongParameters},
		"no such slot":           {algP256, 0x82, challenge(tagChallenge, digest[:]), WrongParameters},
		"management key":         {0x03, refManagement, challenge(tagChallenge, digest[:8]), SecurityStatus},
		"no response asked":      {algP256, Authentication, tlv(nil, tagTemplate, tlv(nil, tagChallenge, digest[:])), WrongData},
		"digest too long":        {algP256, Authentication, challenge(tagChallenge, make([]byte, 33)), WrongData},
		"no template":            {algP256, Authentication, digest[:], WrongData},
		"agreement by 9A":        {algP256, Authentication, challenge(tagExponent, point(t).PublicKey().Bytes()), WrongData},
		"signature by 9D":        {algP256, KeyManagement, challenge(tagChallenge, digest[:]), WrongData},
		"point not on the curve": {algP256, KeyManagement, challenge(tagExponent, append([]byte{4}, make([]byte, 64)...)), WrongData},
	} {
		before := f.host.uses
		if _, sw := f.authenticate(c.alg, c.slot, c.data); sw != c.want || f.host.uses != before {
			t.Errorf("%s: %04X, want %04X; the key was used %d times", what, uint16(sw), uint16(c.want), f.host.uses-before)
		}
	}
	peer := point(t)
	secret, sw := f.authenticate(algP256, KeyManagement, challenge(tagExponent, peer.PublicKey().Bytes()))
	theirs, err := f.cert[KeyManagement].PublicKey.(*ecdsa.PublicKey).ECDH()
	if err != nil {
		t.Fatal(err)
	}
	want, err := peer.ECDH(theirs)
	if sw != OK || err != nil || !bytes.Equal(secret, want) {
		t.Errorf("key agreement: %04X, %v", uint16(sw), err)
	}
}

func TestRSAChained(t *testing.T) {
	f := newCard(t, true)
	f.choose()
	f.login()
	digest := sha256.Sum256([]byte("sekisho"))
	// PKCS #1 v1.5 padding (RFC 8017, section 9.2).
	info := unhex(t, "3031300d060960864801650304020105000420")
	block := append([]byte{0, 1}, bytes.Repeat([]byte{0xff}, 256-3-len(info)-32)...)
	block = append(append(append(block, 0), info...), digest[:]...)
	sig, sw := f.authenticate(algRSA2048, Authentication, challenge(tagChallenge, block))
	if sw != OK {
		t.Fatalf("status %04X", uint16(sw))
	}
	if err := f.cert[Authentication].CheckSignature(x509.SHA256WithRSA, []byte("sekisho"), sig); err != nil {
		t.Error(err)
	}
	// A chain that another command interrupts is forgotten.
	template := challenge(tagChallenge, block)
	f.want(OK, append([]byte{claChain, insAuthenticate, algRSA2048, 0x9a, 200}, template[:200]...)...)
	f.want(OK, unhex(t, "00CB3FFF035C017E00")...)
	if _, sw := f.authenticate(algRSA2048, Authentication, template[200:]); sw != WrongData {
		t.Errorf("the end of a broken chain: %04X", uint16(sw))
	}
	// An endless one is refused.
	var sw2 Status
	for range maxChain/255 + 1 {
		_, sw2 = f.send(append([]byte{claChain, insAuthenticate, algRSA2048, 0x9a, 255}, make([]byte, 255)...)...)
	}
	if sw2 != WrongLength {
		t.Errorf("a chain over %d bytes: %04X", maxChain, uint16(sw2))
	}
}

func TestPIN(t *testing.T) {
	f := newCard(t, false)
	f.choose()
	wrong := append([]byte{0, insVerify, 0, refApplicationPIN, 8}, pad(t, "999999")...)
	f.want(VerifyFailed+2, wrong...)
	f.login()
	f.want(OK, 0, insVerify, 0, refApplicationPIN)
	f.want(OK, append([]byte{0, insGetData, 0x3f, 0xff, 5, 0x5c, 3, 0x5f, 0xc1, 9}, 0)...)
	f.choose() // again: nothing is forgotten (section 3.1.1)
	f.want(OK, 0, insVerify, 0, refApplicationPIN)
	f.want(NotFound, unhex(t, "00A4040005A000000001")...)
	f.want(OK, 0, insVerify, 0, refApplicationPIN)
	f.want(OK, 0, insVerify, 0xff, refApplicationPIN) // log out
	f.want(VerifyFailed+3, 0, insVerify, 0, refApplicationPIN)
	f.login()
	f.clock.add(pinIdle + time.Second)
	f.want(VerifyFailed+3, 0, insVerify, 0, refApplicationPIN)
	f.login()
	f.Reset()
	f.choose()
	f.want(VerifyFailed+3, 0, insVerify, 0, refApplicationPIN)
	f.login()
	f.want(VerifyFailed+2, wrong...) // a wrong PIN also logs out
	f.want(VerifyFailed+2, 0, insVerify, 0, refApplicationPIN)
	f.want(VerifyFailed+1, wrong...)
	f.want(Blocked, wrong...)
	f.want(Blocked, append([]byte{0, insVerify, 0, refApplicationPIN, 8}, pad(t, testPIN)...)...)
	f.want(Blocked, append(append([]byte{0, insChange, 0, refApplicationPIN, 16}, pad(t, testPIN)...), pad(t, "222222")...)...)
	f.want(Blocked, 0, insVerify, 0, refApplicationPIN)
}

func TestChangePIN(t *testing.T) {
	f := newCard(t, false)
	f.choose()
	change := func(old, next []byte) []byte {
		return append(append([]byte{0, insChange, 0, refApplicationPIN, byte(len(old) + len(next))}, old...), next...)
	}
	f.want(VerifyFailed+2, change(pad(t, "999999"), pad(t, "222222"))...)
	f.want(WrongData, change(pad(t, testPIN), []byte("abcdefgh"))...)
	f.want(WrongData, change(pad(t, testPIN), nil)...)
	f.want(OK, change(pad(t, testPIN), pad(t, "22222222"))...)
	f.want(VerifyFailed+2, append([]byte{0, insVerify, 0, refApplicationPIN, 8}, pad(t, testPIN)...)...)
	f.want(OK, append([]byte{0, insVerify, 0, refApplicationPIN, 8}, pad(t, "22222222")...)...)
}

// A try is spent before the PIN is compared, so that pulling the power wins
// none; and where it cannot be stored, nothing is compared.
func TestPINOverPowerCuts(t *testing.T) {
	store := &memory{}
	pin, err := OpenPIN(store)
	if err != nil {
		t.Fatal(err)
	}
	if err := pin.Verify(pad(t, testPIN)); !errors.Is(err, ErrBlocked) {
		t.Errorf("a PIN that was never set: %v", err)
	}
	if err := errors.Join(pin.Limit(3), pin.Set(pad(t, testPIN))); err != nil {
		t.Fatal(err)
	}
	for left := 3; left > 0; left-- {
		// The power goes right after the first save of a right PIN.
		cut := &memory{state: store.state}
		p, err := OpenPIN(&onlyOnce{cut})
		if err != nil {
			t.Fatal(err)
		}
		if err := p.Verify(pad(t, testPIN)); err == nil {
			t.Fatal("a PIN whose counter could not be put back was taken")
		}
		if cut.state.Left != left-1 {
			t.Errorf("after the cut %d tries, want %d", cut.state.Left, left-1)
		}
		store.state = cut.state
	}
	store.state.Left = 3
	store.fail = errors.New("disk full")
	if pin, err = OpenPIN(store); err != nil {
		t.Fatal(err)
	}
	if err := pin.Verify(pad(t, testPIN)); err == nil {
		t.Error("a PIN was compared although the try could not be stored")
	}
}

// onlyOnce stores once, then the power is gone.
type onlyOnce struct{ *memory }

func (o *onlyOnce) SavePIN(s PINState) error {
	if o.saves > 0 {
		return errors.New("no power")
	}
	return o.memory.SavePIN(s)
}

func TestNoPIN(t *testing.T) {
	var n NoPIN
	if err := n.Verify(pad(t, "000000")); err != nil || n.Left() != 1 {
		t.Errorf("%v, %d left", err, n.Left())
	}
	if err := n.Verify([]byte("x")); !errors.Is(err, ErrForm) {
		t.Errorf("no PIN at all: %v", err)
	}
}

// mutated is a source of command sequences: recorded ones, changed.
func mutated(r *rand.Rand) [][]byte {
	var base [][]byte
	for _, steps := range recorded {
		for _, s := range steps {
			b, _ := hex.DecodeString(strings.ReplaceAll(s[0], " ", ""))
			base = append(base, b)
		}
	}
	digest := make([]byte, 32)
	base = append(base,
		append([]byte{0, insAuthenticate, algP256, 0x9a, 0x26}, challenge(tagChallenge, digest)...),
		append([]byte{0, insAuthenticate, algP256, 0x9e, 0x26}, challenge(tagChallenge, digest)...),
		append([]byte{0, insVerify, 0, 0x80, 8}, "123456\xff\xff"...))
	var out [][]byte
	for range 1 + r.IntN(30) {
		b := bytes.Clone(base[r.IntN(len(base))])
		for range r.IntN(4) {
			switch i := r.IntN(len(b)); r.IntN(4) {
			case 0:
				b[i] = byte(r.Uint32())
			case 1:
				b[i] ^= 1 << r.IntN(8)
			case 2:
				b = slices.Insert(b, i, byte(r.Uint32()))
			case 3:
				if len(b) > 1 {
					b = slices.Delete(b, i, i+1)
				}
			}
		}
		out = append(out, b)
	}
	return out
}

// A thousand sequences, random and mutated: no crash, and with the gate shut no
// answer that holds a signature.
func TestThousandSequences(t *testing.T) {
	r := rand.New(rand.NewPCG(6, 2026))
	f := newCard(t, false)
	f.host.shut(true)
	for i := range 1000 {
		f.Reset()
		f.store.state.Left = 3
		if i%10 == 0 {
			f.choose()
			f.login()
		}
		for _, command := range mutated(r) {
			f.check(command)
		}
		random := make([]byte, r.IntN(300))
		for j := range random {
			random[j] = byte(r.Uint32())
		}
		f.check(random)
	}
	if f.host.uses != 0 {
		t.Errorf("%d uses of a key with the gate shut", f.host.uses)
	}
}

// check sends a command and holds the answer against what is always true of
// one while the gate is shut.
func (f *fixture) check(command []byte) {
	f.t.Helper()
	answer := f.Transmit(context.Background(), command)
	if len(answer) < 2 || len(answer) > 65536+2 {
		f.t.Fatalf("%x: answer of %d bytes", command, len(answer))
	}
	if tag, body, _, ok := nextTLV(answer[:len(answer)-2]); ok && tag == tagTemplate && len(body) > 0 && body[0] == tagResponse {
		f.t.Fatalf("%x: a response of a key with the gate shut: %x", command, answer)
	}
}

func TestRefusesProfiles(t *testing.T) {
	f := newCard(t, false)
	for what, p := range map[string]Profile{
		"no such slot":     {Keys: map[Slot]Key{0x9b: f.keys[Authentication]}},
		"no key":           {Keys: map[Slot]Key{Authentication: {}}},
		"huge certificate": {Keys: map[Slot]Key{Authentication: {f.keys[Authentication].Public, make([]byte, maxCertificate+1)}}},
	} {
		if err := f.Load(p); err == nil {
			t.Errorf("%s: was taken", what)
		}
	}
}

func TestATR(t *testing.T) {
	want := "3b8b408f80f9a00000030800001000"
	if got := hex.EncodeToString(ATR()); got != want {
		t.Errorf("answer to reset %s, want %s", got, want)
	}
}

func FuzzTransmit(f *testing.F) {
	for _, steps := range recorded {
		for _, s := range steps {
			f.Add(unhex(f, s[0]), []byte{0x00, 0xc0, 0, 0, 0})
		}
	}
	card := newCard(f, false)
	card.host.shut(true)
	f.Fuzz(func(t *testing.T, first, second []byte) {
		card.t = t
		card.Reset()
		card.choose()
		card.check(first)
		card.check(second)
	})
}

func FuzzParseCommand(f *testing.F) {
	f.Add([]byte{0, 0xa4, 4, 0, 0, 0, 1, 2, 0, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		c, err := ParseCommand(b)
		if err == nil && (len(c.Data) > len(b) || c.Ne < 0 || c.Ne > 65536) {
			t.Errorf("%x: %+v", b, c)
		}
	})
}
