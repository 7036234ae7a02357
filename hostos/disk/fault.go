package disk

import (
	"errors"
	"fmt"
	"strings"

	"sekisho/attest/gate"
)

// Codes beside those of gate.KeyRefused.
const (
	codeRecord = "no-record" // the record of the sealed key is damaged or gone
	codeWiped  = "wiped"
	codeDevice = "device" // the partition or the device mapper
)

// Fault is why the disk stays locked.
type Fault struct {
	Codes []string
	Cause error
}

func fault(code string, cause error) error { return &Fault{[]string{code}, cause} }

// keyFault is the Fault of what attestd answered.
func keyFault(err error) error {
	var no *gate.KeyRefused
	if errors.As(err, &no) && len(no.Codes) > 0 {
		return &Fault{no.Codes, err}
	}
	return fault(codeDevice, err)
}

func (f *Fault) Error() string {
	return fmt.Sprintf("work disk stays locked (%s): %v", strings.Join(f.Codes, ", "), f.Cause)
}

func (f *Fault) Unwrap() error { return f.Cause }

// Words says to a person why the disk stays locked and what to do, English
// first, because the kernel's console has no glyphs for Japanese.
func (f *Fault) Words() string {
	var english, japanese []string
	for _, code := range f.Codes {
		e, j := words(code)
		english, japanese = append(english, e), append(japanese, j)
	}
	return fmt.Sprintf("work disk stays locked (%s): %s / 業務ディスクは開きません: %s",
		strings.Join(f.Codes, ", "), strings.Join(english, "; "), strings.Join(japanese, "。"))
}

// words explains one code.
func words(code string) (english, japanese string) {
	switch code {
	case gate.CodeSecureBoot:
		return "Secure Boot is off or its keys are others; switch it on in the firmware setup",
			"セキュアブートが無効か、鍵が異なります。ファームウェア設定で有効にしてください"
	case gate.CodeImage:
		return "this is not the image, or not the command line, that was signed for it; start the installed release",
			"署名されたイメージまたは起動パラメーターではありません。正規のリリースで起動してください"
	case gate.CodeUsed:
		return "a key was used already in this boot; switch the laptop off and on",
			"この起動では鍵が既に使われています。電源を入れ直してください"
	case gate.CodeRolledBack:
		return "this release is older than one that this laptop has run; start the newest one",
			"この端末で実行済みのものより古いリリースです。最新のリリースで起動してください"
	case gate.CodeOtherTPM:
		return "this is not the TPM that the key was sealed to, or it was cleared; use the recovery key",
			"鍵を封印した TPM と異なるか、TPM が消去されています。回復キーを使用してください"
	case gate.CodeHeader:
		return "the disk was exchanged or its header changed; do not use this disk",
			"ディスクが交換されたか、ヘッダーが変更されています。このディスクを使用しないでください"
	case gate.CodeNoEscrow:
		return "the organisation has no escrow key, so no disk is made; ask its administrator",
			"組織の回復キー保管用の鍵が設定されていません。管理者に連絡してください"
	case gate.CodePolicy:
		return "the image carries no signed policies; install a signed release",
			"イメージに署名済みポリシーがありません。署名済みリリースをインストールしてください"
	case gate.CodeRecovery:
		return "this is not the disk's recovery key; type it again", "回復キーが正しくありません。もう一度入力してください"
	case codeWiped:
		return "its key was destroyed on the organisation's order; have the laptop installed again",
			"組織の指示により鍵が消去されました。再インストールが必要です"
	case codeRecord:
		return "the record of its sealed key is damaged or missing; have the laptop looked at",
			"封印された鍵の記録がないか、壊れています。管理者に連絡してください"
	case codeDevice:
		return "the disk cannot be used; have the laptop looked at", "ディスクを使用できません。管理者に連絡してください"
	}
	return "the TPM refuses the key; use the recovery key", "TPM が鍵の使用を拒否しました。回復キーを使用してください"
}
