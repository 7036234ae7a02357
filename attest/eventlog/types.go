package eventlog

import "fmt"

// TypeName is an event type's name in section 10.4.1, as tpm2-tools and others
// print it too.
func TypeName(t uint32) string {
	switch t {
	case TypePostCode:
		return "EV_POST_CODE"
	case TypeNoAction:
		return "EV_NO_ACTION"
	case TypeSeparator:
		return "EV_SEPARATOR"
	case TypeAction:
		return "EV_ACTION"
	case TypeTag:
		return "EV_EVENT_TAG"
	case TypeCRTMContents:
		return "EV_S_CRTM_CONTENTS"
	case TypeCRTMVersion:
		return "EV_S_CRTM_VERSION"
	case TypeMicrocode:
		return "EV_CPU_MICROCODE"
	case TypeConfigFlags:
		return "EV_PLATFORM_CONFIG_FLAGS"
	case TypeTableOfDevices:
		return "EV_TABLE_OF_DEVICES"
	case TypeCompactHash:
		return "EV_COMPACT_HASH"
	case TypeIPL:
		return "EV_IPL"
	case TypeIPLPartition:
		return "EV_IPL_PARTITION_DATA"
	case TypeNonhostCode:
		return "EV_NONHOST_CODE"
	case TypeNonhostConfig:
		return "EV_NONHOST_CONFIG"
	case TypeNonhostInfo:
		return "EV_NONHOST_INFO"
	case TypeOmitBootDevice:
		return "EV_OMIT_BOOT_DEVICE_EVENTS"
	case TypePostCode2:
		return "EV_POST_CODE2"
	case TypeVariableConfig:
		return "EV_EFI_VARIABLE_DRIVER_CONFIG"
	case TypeVariableBoot:
		return "EV_EFI_VARIABLE_BOOT"
	case TypeApplication:
		return "EV_EFI_BOOT_SERVICES_APPLICATION"
	case TypeBootDriver:
		return "EV_EFI_BOOT_SERVICES_DRIVER"
	case TypeRuntimeDriver:
		return "EV_EFI_RUNTIME_SERVICES_DRIVER"
	case TypeGPT:
		return "EV_EFI_GPT_EVENT"
	case TypeEFIAction:
		return "EV_EFI_ACTION"
	case TypeFirmwareBlob:
		return "EV_EFI_PLATFORM_FIRMWARE_BLOB"
	case TypeHandoffTables:
		return "EV_EFI_HANDOFF_TABLES"
	case TypeFirmwareBlob2:
		return "EV_EFI_PLATFORM_FIRMWARE_BLOB2"
	case TypeHandoffTables2:
		return "EV_EFI_HANDOFF_TABLES2"
	case TypeVariableBoot2:
		return "EV_EFI_VARIABLE_BOOT2"
	case TypeGPT2:
		return "EV_EFI_GPT_EVENT2"
	case TypeHCRTM:
		return "EV_EFI_HCRTM_EVENT"
	case TypeVariableAuth:
		return "EV_EFI_VARIABLE_AUTHORITY"
	case TypeSPDMBlob:
		return "EV_EFI_SPDM_FIRMWARE_BLOB"
	case TypeSPDMConfig:
		return "EV_EFI_SPDM_FIRMWARE_CONFIG"
	case TypeSPDMDevicePolicy:
		return "EV_EFI_SPDM_DEVICE_POLICY"
	case TypeSPDMDeviceAuth:
		return "EV_EFI_SPDM_DEVICE_AUTHORITY"
	}
	return fmt.Sprintf("0x%08x", t)
}
